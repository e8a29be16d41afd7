"""How a trained backbone arranges some test images: a 2-D map of their features, and the nearest others of an image.

Axes: N images, D feature width.
"""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vit_suite.attention.render import as_picture
from vit_suite.data.source import ImageSource
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.weights.checkpoint import LoadedBackbone

QUERIES = 8
"""Images whose neighbours are shown."""
NEIGHBOURS = 7
LEAST_IMAGES = 30
"""Fewer images make no map of neighbourhoods."""
THUMBNAIL = 48
"""Longest side in pixels of a picture in the map."""


class Embedding(NamedTuple):
    """Features of the images that decode, and where each stands on the map."""

    features: np.ndarray
    """float32 (N, D), rows of length 1."""
    places: dict[str, np.ndarray]
    """Kind of map -> float (N, 2): `PCA` always, `UMAP` or `t-SNE` where a library for it is installed."""
    names: list[str]
    labels: list[str]
    """Class names; empty text where an image has no label."""
    thumbnails: list[str]
    """Data URIs."""
    explained: float
    """Share of the variance that the two axes of PCA carry, 0..1."""


def embed(loaded: LoadedBackbone, source: ImageSource, further: bool = True) -> Embedding:
    """The map of the images of `source` under a backbone, seen as its scores see them, in fp32."""
    options = FeatureOptions(precision="fp32")
    found = extract_features(loaded.backbone, source, list(loaded.image_size), loaded.mean, loaded.std, options)
    features = found.features.numpy()
    indices = found.indices.tolist()
    labels = [source.label(index) for index in indices]
    pca, explained = principal_axes(features)
    return Embedding(
        features,
        {"PCA": pca} | (further_maps(features) if further else {}),
        [source.path(index).rpartition("/")[2] for index in indices],
        [source.classes[label] if 0 <= label < len(source.classes) else "" for label in labels],
        [thumbnail(source.load(index)) for index in indices],
        explained,
    )


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, float]:
    """(N, 2) places along the first two principal components, and the share of variance that they carry.

    The sign of an axis is chosen so that its largest weight is positive: the map does not flip from run to run.
    """
    centered = features - features.mean(0)
    if len(features) < 2:
        return np.zeros((len(features), 2)), 1.0
    _, sizes, axes = np.linalg.svd(centered.astype(np.float64), full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    places = centered @ (axes * signs[:, None])[:2].T
    total = float((sizes**2).sum())
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1]))), float((sizes[:2] ** 2).sum()) / total if total else 1.0


def further_maps(features: np.ndarray) -> dict[str, np.ndarray]:
    """UMAP, else t-SNE, where `umap-learn` or `scikit-learn` is installed and there are `LEAST_IMAGES` or more."""
    if len(features) < LEAST_IMAGES:
        return {}
    try:
        from umap import UMAP

        return {"UMAP": UMAP(n_components=2, metric="cosine", random_state=0).fit_transform(features)}
    except ImportError:
        pass
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return {}
    perplexity = min(30, len(features) // 4)  # 30 is in the middle of the paper's range; it must be below the count
    return {
        "t-SNE": TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=0).fit_transform(features)
    }


def neighbours(features: np.ndarray, queries: int = QUERIES, count: int = NEIGHBOURS) -> list[tuple[int, list[int]]]:
    """(query, its nearest others by cosine) of `queries` images, evenly spread over the rows."""
    chosen = np.unique(np.linspace(0, len(features) - 1, min(queries, len(features))).round().astype(int))
    similar = features[chosen] @ features.T
    similar[np.arange(len(chosen)), chosen] = -np.inf
    order = np.argsort(-similar, axis=1, kind="stable")[:, : min(count, len(features) - 1)]
    return [(int(query), row.tolist()) for query, row in zip(chosen, order, strict=True)]


def thumbnail(picture: torch.Tensor, side: int = THUMBNAIL) -> str:
    """uint8 (C, H, W) as a JPEG data URI of at most `side` pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(as_picture(picture.numpy())))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
