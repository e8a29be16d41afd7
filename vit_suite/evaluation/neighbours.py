"""What a file of embeddings says about its images, without a network: nearest images of a query, clusters, numbers.

Axes: N images, D width of a feature, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_suite.config import NeighboursConfig
from vit_suite.data.decode import DecodeError, decode
from vit_suite.data.pixels import AUTO, MAX_PIXELS, Reading, ValueRange
from vit_suite.errors import UserError, nearest
from vit_suite.evaluation.embedding import Embedder, EmbedOptions
from vit_suite.evaluation.embedding_files import Embeddings
from vit_suite.evaluation.geometry import alignment, effective_rank, normalized, rankme, uniformity
from vit_suite.weights.checkpoint import load_backbone

RESTARTS = 4
"""Starts of k-means. The one with the lowest inertia is kept."""


@dataclass(frozen=True)
class Query:
    """An image whose neighbours are asked for."""

    path: str
    feature: Tensor
    """(D,)."""
    row: int
    """Its row in the file of embeddings; -1 for an image from outside."""


@dataclass(frozen=True)
class Clusters:
    """k-means clusters of N images. Clusters are numbered by size; the largest is 0."""

    number: np.ndarray
    """int64 (N,): the cluster of each image."""
    distance: np.ndarray
    """float64 (N,): from the image to the center of its cluster."""
    order: np.ndarray
    """int64 (N,): images by cluster, and within a cluster by distance."""
    metrics: dict[str, Any]
    """count, inertia, largest; with labels nmi (normalized mutual information of clusters and classes, 0..1)."""


def check_alike(found: Embeddings, other: Embeddings) -> None:
    """UserError when the features of two files cannot be compared."""
    names = ("sha256", "kind", "size", "normalize")
    differ = [name for name in names if found.protocol.get(name) != other.protocol.get(name)]
    if differ or found.features.shape[1] != other.features.shape[1]:
        what = ", ".join(differ) or "width"
        raise UserError(f"'{found.path}' and '{other.path}' were not made alike (they differ in {what}).")


def numbers(found: Embeddings, seed: int) -> dict[str, Any]:
    """RankMe, effective rank and uniformity of the features; with labels their alignment too."""
    labels = torch.from_numpy(np.array(found.columns.labels))
    metrics: dict[str, Any] = {
        "rankme": rankme(found.features),
        "effective_rank": effective_rank(found.features),
        "uniformity": uniformity(found.features, seed),
    }
    aligned = alignment(found.features, labels, seed)
    return metrics if aligned is None else metrics | {"alignment_of_classes": aligned}


# Queries
# ----------------------------------------------------------------------------------------------------------------------


def find_queries(cfg: NeighboursConfig, found: Embeddings) -> list[Query]:
    """The images that `cfg.query` names: rows of the file, then images from outside, embedded by `cfg.checkpoint`.

    UserError for a name that is in neither.
    """
    queries: list[Query] = []
    outside: list[str] = []
    for asked in cfg.query or ():
        row = row_of(found.columns.paths, asked)
        if row is None:
            outside.append(asked)
        else:
            queries.append(Query(found.columns.paths[row], found.features[row], row))
    return queries + (_embedded(cfg, found, outside) if outside else [])


def row_of(paths: Sequence[str], asked: str) -> int | None:
    """The row whose path is `asked`, else the only row whose path ends with it, else None.

    UserError when several paths end with it: `a.jpg` fits cats/a.jpg and dogs/a.jpg.
    """
    exact = [row for row, path in enumerate(paths) if path == asked]
    if exact:
        return exact[0]
    ends = [row for row, path in enumerate(paths) if path.endswith("/" + asked.lstrip("/"))]
    if len(ends) > 1:
        raise UserError(f"query '{asked}' fits {len(ends)} images, first '{paths[ends[0]]}' and '{paths[ends[1]]}'.")
    return ends[0] if ends else None


def _embedded(cfg: NeighboursConfig, found: Embeddings, paths: Sequence[str]) -> list[Query]:
    """Features of images that are not in the file, made in the way that the file's own were made."""
    if cfg.checkpoint is None:
        hint = nearest(paths[0], found.columns.paths)
        raise UserError(
            f"query '{paths[0]}' is no image of '{cfg.embeddings}'.{hint} For an image from outside give --checkpoint."
        )
    loaded = load_backbone(cfg.checkpoint, cfg)
    if loaded.sha256 != found.protocol.get("sha256"):
        raise UserError(
            f"'{cfg.embeddings}' was made with other weights than '{cfg.checkpoint}' (their sha256 differ)."
        )
    made = found.protocol
    height, width = made["size"]
    options = EmbedOptions(made["kind"], made["normalize"], (height, width), len(paths), made["precision"])
    embedder = Embedder(loaded.backbone, loaded.mean, loaded.std, options)
    how = reading_of(found)
    queries = []
    for path in paths:
        try:
            pixels = torch.from_numpy(np.array(decode(path, loaded.backbone.cfg.channels, None, how), order="C"))
        except DecodeError as error:
            raise UserError(f"query '{path}' does not decode: {error.reason}") from None
        queries.append(Query(path, embedder([pixels])[0], -1))
    return queries


def reading_of(found: Embeddings) -> Reading:
    """How the files were read whose features these are."""
    made = found.protocol
    how = ValueRange(*made.get("value_range", AUTO)), made.get("max_pixels", MAX_PIXELS), made.get("frame", 0)
    return Reading(*how)


# Clusters
# ----------------------------------------------------------------------------------------------------------------------


def need_kmeans() -> Any:
    """scikit-learn's KMeans; UserError when it is not installed."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError("clusters need scikit-learn: pip install 'vit-suite[embed]'.") from None
    return KMeans


def find_clusters(found: Embeddings, count: int, seed: int) -> Clusters:
    """`count` clusters of the features by k-means on unit rows (so by cosine); scikit-learn must be installed."""
    from sklearn.metrics import normalized_mutual_info_score

    rows = normalized(found.features).numpy()
    model = need_kmeans()(count, n_init=RESTARTS, random_state=seed).fit(rows)
    sizes = np.bincount(model.labels_, minlength=count)
    by_size = np.empty(count, np.int64)
    by_size[np.argsort(-sizes, kind="stable")] = np.arange(count)
    number = by_size[model.labels_]
    distance = np.linalg.norm(rows - model.cluster_centers_[model.labels_], axis=1)
    order = np.lexsort((np.arange(len(rows)), distance, number))
    metrics: dict[str, Any] = {"count": count, "inertia": float(model.inertia_), "largest": int(sizes.max())}
    labeled = found.columns.labels >= 0
    if labeled.any():
        metrics["nmi"] = float(normalized_mutual_info_score(found.columns.labels[labeled], number[labeled]))
    return Clusters(number, distance, order, metrics)
