"""`vit-suite neighbours`: what a file of embeddings says about its images, without a network."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_suite.commands.embed import make_embedder
from vit_suite.config import EmbedConfig, NeighboursConfig
from vit_suite.data.decode import DecodeError, decode
from vit_suite.errors import UserError, nearest
from vit_suite.evaluation.embedding_files import Embeddings, read_embeddings
from vit_suite.evaluation.geometry import (
    Pair,
    alignment,
    alike,
    effective_rank,
    nearest_rows,
    normalized,
    rankme,
    uniformity,
)
from vit_suite.files import safe_cell, write_atomically
from vit_suite.logs import speak
from vit_suite.reports.contact import BLUE, GREEN, RED, Tile, write_sheet
from vit_suite.reports.results import append_result
from vit_suite.weights.checkpoint import load_backbone

SHOWN_PAIRS = 24
"""Pairs on a sheet."""
SHOWN_MEMBERS = 10
"""Images of a cluster on the sheet: those nearest to its center."""
SHOWN_CLUSTERS = 40
RESTARTS = 4
"""Starts of k-means; the one with the lowest inertia is kept."""


@dataclass(frozen=True)
class Query:
    """An image whose neighbours are asked for."""

    path: str
    feature: Tensor
    """(D,)."""
    row: int
    """Of the file; -1 for an image from outside."""


def run(cfg: NeighboursConfig) -> None:
    """Write what the options ask for into `cfg.output`."""
    speak()
    found = read_embeddings(cfg.embeddings)
    other = None if cfg.leak is None else read_embeddings(cfg.leak)
    if other is not None:
        _check_same(found, other)
    queries = find_queries(cfg, found)
    if cfg.clusters is not None and cfg.clusters > len(found):
        raise UserError(f"clusters {cfg.clusters} is more than '{cfg.embeddings}' has images: {len(found)}.")
    cluster = None if cfg.clusters is None else need_kmeans()
    folder = Path(cfg.output)
    _check_folder(folder, cfg.overwrite)
    pairs = alike(found.features, cfg.cosine) if cfg.duplicates else None
    shared = None if other is None else alike(found.features, cfg.cosine, other.features)
    metrics = numbers(found, cfg.seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = None if cfg.images is None else Path(cfg.images)
    said = []
    if queries:
        said.append(write_neighbours(folder, found, queries, cfg.k, images))
    if pairs is not None:
        said.append(write_pairs(folder / "duplicates", found, found, pairs, images))
        metrics["duplicate_pairs"] = len(pairs)
    if shared is not None and other is not None:
        said.append(write_pairs(folder / "leak", found, other, shared, images))
        metrics["leaked_images"] = len({pair.second for pair in shared})
    if cluster is not None and cfg.clusters is not None:
        metrics["clusters"] = write_clusters(folder, found, cfg.clusters, cfg.seed, images)
        said.append(f"{cfg.clusters} clusters: {folder}/clusters.csv, clusters.png")
    protocol = {"embeddings": cfg.embeddings, "made_with": found.protocol, "images": len(found), "cosine": cfg.cosine}
    protocol |= {"leak": cfg.leak, "seed": cfg.seed}
    append_result(folder / "results.json", "embeddings", metrics, protocol, found.protocol.get("sha256"))
    print("\n".join([*said, figures(metrics), f"appended to {folder / 'results.json'}"]))


def numbers(found: Embeddings, seed: int) -> dict[str, Any]:
    """RankMe, effective rank, uniformity, and where there are labels alignment."""
    labels = torch.from_numpy(np.asarray(found.columns.labels))
    metrics: dict[str, Any] = {
        "rankme": rankme(found.features),
        "effective_rank": effective_rank(found.features),
        "uniformity": uniformity(found.features, seed),
    }
    aligned = alignment(found.features, labels, seed)
    return metrics if aligned is None else metrics | {"alignment_of_classes": aligned}


def figures(metrics: dict[str, Any]) -> str:
    """The numbers in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))


# Queries
# ----------------------------------------------------------------------------------------------------------------------


def find_queries(cfg: NeighboursConfig, found: Embeddings) -> list[Query]:
    """The rows of the file that the queries name, or with a checkpoint their features. UserError for one that is in
    neither."""
    queries: list[Query] = []
    outside: list[str] = []
    for asked in cfg.query or ():
        row = row_of(found.columns.paths, asked)
        if row is None:
            outside.append(asked)
        else:
            queries.append(Query(found.columns.paths[row], found.features[row], row))
    return queries + (embedded(cfg, found, outside) if outside else [])


def row_of(paths: Sequence[str], asked: str) -> int | None:
    """The row whose path is `asked`, or ends with it where one alone does; None without such a row."""
    exact = [row for row, path in enumerate(paths) if path == asked]
    if exact:
        return exact[0]
    ends = [row for row, path in enumerate(paths) if path.endswith("/" + asked.lstrip("/"))]
    if len(ends) > 1:
        raise UserError(f"query '{asked}' fits {len(ends)} images, first '{paths[ends[0]]}' and '{paths[ends[1]]}'.")
    return ends[0] if ends else None


def embedded(cfg: NeighboursConfig, found: Embeddings, paths: Sequence[str]) -> list[Query]:
    """Features of images that are not in the file, made as those of the file were."""
    if cfg.checkpoint is None:
        hint = nearest(paths[0], found.columns.paths)
        raise UserError(
            f"query '{paths[0]}' is no image of '{cfg.embeddings}'.{hint} For an image from outside give --checkpoint."
        )
    loaded = load_backbone(cfg.checkpoint)
    if loaded.sha256 != found.protocol.get("sha256"):
        raise UserError(
            f"'{cfg.embeddings}' was made with other weights than '{cfg.checkpoint}' (their sha256 differ)."
        )
    made = found.protocol
    options = EmbedConfig(
        cfg.checkpoint,
        features=made["kind"],
        normalize=made["normalize"],
        image_size=made["size"][0],
        precision=made["precision"],
        accelerator="cpu",
    )
    embedder = make_embedder(options, loaded)
    queries = []
    for path in paths:
        try:
            pixels = torch.from_numpy(np.array(decode(path, loaded.backbone.cfg.channels), order="C"))
        except DecodeError as error:
            raise UserError(f"query '{path}' does not decode: {error.reason}") from None
        queries.append(Query(path, embedder([pixels])[0], -1))
    return queries


# What is written
# ----------------------------------------------------------------------------------------------------------------------


def write_neighbours(folder: Path, found: Embeddings, queries: list[Query], k: int, images: Path | None) -> str:
    """neighbours.csv and neighbours.png: a row a query, its nearest after it."""
    features = torch.stack([query.feature for query in queries])
    rows = torch.tensor([query.row for query in queries])
    cosines, places = nearest_rows(found.features, features, k, rows if bool((rows >= 0).any()) else None)
    lines, tiles = [], []
    for query, values, near in zip(queries, cosines.tolist(), places.tolist(), strict=True):
        own = found.columns.classes[query.row] if query.row >= 0 else ""
        tiles.append([Tile(query.path, ["query", own], BLUE)])
        for rank, (value, row) in enumerate(zip(values, near, strict=True), 1):
            name = found.columns.classes[row]
            lines.append([query.path, rank, found.columns.paths[row], f"{value:.6f}", name])
            frame = None if not own or not name else GREEN if own == name else RED
            tiles[-1].append(Tile(found.columns.paths[row], [f"{value:.3f}", name], frame))
    _write_csv(folder / "neighbours.csv", ["query", "rank", "path", "cosine", "class"], lines)
    write_sheet(folder / "neighbours.png", tiles, [query.path for query in queries], images)
    return f"{len(queries)} queries: {folder}/neighbours.csv, neighbours.png"


def write_pairs(place: Path, first: Embeddings, second: Embeddings, pairs: list[Pair], images: Path | None) -> str:
    """PLACE.csv of all pairs and PLACE.png of the most alike."""
    lines = [
        [
            first.columns.paths[a],
            second.columns.paths[b],
            f"{cosine:.6f}",
            first.columns.classes[a],
            second.columns.classes[b],
        ]
        for a, b, cosine in pairs
    ]
    _write_csv(place.with_suffix(".csv"), ["first", "second", "cosine", "class of first", "class of second"], lines)
    files = place.with_suffix(".csv").name
    if pairs:
        tiles = []
        for a, b, cosine in pairs[:SHOWN_PAIRS]:
            tiles.append(
                [
                    Tile(first.columns.paths[a], [f"{cosine:.4f}", first.columns.classes[a]]),
                    Tile(second.columns.paths[b], ["", second.columns.classes[b]]),
                ]
            )
        rows = [sum(tiles[start : start + 4], []) for start in range(0, len(tiles), 4)]
        write_sheet(place.with_suffix(".png"), rows, ["pairs, side by side"] + [""] * (len(rows) - 1), images)
        files += f", {place.with_suffix('.png').name}"
    return f"{place.name}: {len(pairs)} pairs in {place.parent}/{files}"


def need_kmeans() -> Any:
    """scikit-learn's KMeans; UserError when it is not installed."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError("clusters need scikit-learn: pip install 'vit-suite[embed]'.") from None
    return KMeans


def write_clusters(folder: Path, found: Embeddings, count: int, seed: int, images: Path | None) -> dict[str, Any]:
    """clusters.csv (path, cluster, distance to the center) and clusters.png; returns their metrics.

    Clusters are numbered by size, the largest is 0.
    """
    from sklearn.metrics import normalized_mutual_info_score

    rows = normalized(found.features).numpy()
    model = need_kmeans()(count, n_init=RESTARTS, random_state=seed).fit(rows)
    sizes = np.bincount(model.labels_, minlength=count)
    number = np.empty(count, np.int64)
    number[np.argsort(-sizes, kind="stable")] = np.arange(count)
    cluster = number[model.labels_]
    distance = np.linalg.norm(rows - model.cluster_centers_[model.labels_], axis=1)
    order = np.lexsort((np.arange(len(rows)), distance, cluster))
    names = found.columns.classes
    lines = [[found.columns.paths[row], int(cluster[row]), f"{distance[row]:.6f}", names[row]] for row in order]
    _write_csv(folder / "clusters.csv", ["path", "cluster", "distance", "class"], lines)
    tiles, titles = [], []
    for place in range(min(count, SHOWN_CLUSTERS)):
        members = [row for row in order if cluster[row] == place]
        tiles.append([Tile(found.columns.paths[row], [names[row]]) for row in members[:SHOWN_MEMBERS]])
        known = [names[row] for row in members if names[row]]
        most = max(set(known), key=lambda name: (known.count(name), name)) if known else ""
        purity = f", {known.count(most) / len(known):.0%} {most}" if known else ""
        titles.append(f"cluster {place}: {len(members)} images{purity}")
    write_sheet(folder / "clusters.png", tiles, titles, images)
    metrics: dict[str, Any] = {"count": count, "inertia": float(model.inertia_), "largest": int(sizes.max())}
    labeled = found.columns.labels >= 0
    if labeled.any():
        metrics["nmi"] = float(normalized_mutual_info_score(found.columns.labels[labeled], cluster[labeled]))
    return metrics


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([safe_cell(cell) for cell in row] for row in rows)

    write_atomically(path, write)


def _check_same(found: Embeddings, other: Embeddings) -> None:
    """UserError when two files cannot be compared."""
    names = ("sha256", "kind", "size", "normalize")
    differ = [name for name in names if found.protocol.get(name) != other.protocol.get(name)]
    if differ or found.features.shape[1] != other.features.shape[1]:
        what = ", ".join(differ) or "width"
        raise UserError(f"'{found.path}' and '{other.path}' were not made alike (they differ in {what}).")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output '{folder}' is a file; expected a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"output '{folder}' is not empty; name another folder, or give --overwrite.")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UserError(f"output '{folder}' cannot be written: '{parent}' is a file.")
