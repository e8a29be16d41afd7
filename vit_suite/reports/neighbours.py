"""Lists (CSV) and contact sheets (PNG) of `vit-suite neighbours`. Each function says in a line what it wrote."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vit_suite.errors import counted
from vit_suite.evaluation.embedding_files import Embeddings
from vit_suite.evaluation.geometry import Pair, nearest_rows
from vit_suite.evaluation.neighbours import Clusters, Query, reading_of
from vit_suite.files import safe_cell, write_atomically
from vit_suite.reports.contact import BLUE, GREEN, RED, Tile, write_sheet

SHOWN_PAIRS = 24
"""Pairs on a sheet."""
PAIRS_IN_A_ROW = 4
SHOWN_MEMBERS = 10
"""Images of a cluster on the sheet: those nearest to its center."""
SHOWN_CLUSTERS = 40


def write_neighbours(folder: Path, found: Embeddings, queries: list[Query], k: int, images: Path | None) -> str:
    """Write neighbours.csv and neighbours.png: a row for each query, followed by the `k` images nearest to it.

    images: the folder that relative paths start from; the working directory when None.
    """
    features = torch.stack([query.feature for query in queries])
    rows = torch.tensor([query.row for query in queries])
    cosines, places = nearest_rows(found.features, features, k, rows if bool((rows >= 0).any()) else None)
    lines, tiles, how = [], [], reading_of(found)
    for query, values, near in zip(queries, cosines.tolist(), places.tolist(), strict=True):
        own = found.columns.classes[query.row] if query.row >= 0 else ""
        tiles.append([Tile(query.path, ["query", own], BLUE, how)])
        for rank, (value, row) in enumerate(zip(values, near, strict=True), 1):
            name = found.columns.classes[row]
            lines.append([query.path, rank, found.columns.paths[row], f"{value:.6f}", name])
            frame = None if not own or not name else GREEN if own == name else RED
            tiles[-1].append(Tile(found.columns.paths[row], [f"{value:.3f}", name], frame, how))
    _write_csv(folder / "neighbours.csv", ["query", "rank", "path", "cosine", "class"], lines)
    write_sheet(folder / "neighbours.png", tiles, [query.path for query in queries], images)
    return f"{len(queries)} queries: {folder}/neighbours.csv, neighbours.png"


def write_pairs(place: Path, first: Embeddings, second: Embeddings, pairs: list[Pair], images: Path | None) -> str:
    """Write PLACE.csv with all pairs and PLACE.png with the most alike.

    A pair is a row of `first` and a row of `second`; both may be the same file.
    """
    a, b = first.columns, second.columns
    lines = [
        [a.paths[one], b.paths[other], f"{cosine:.6f}", a.classes[one], b.classes[other]]
        for one, other, cosine in pairs
    ]
    table, sheet = place.with_suffix(".csv"), place.with_suffix(".png")
    _write_csv(table, ["first", "second", "cosine", "class of first", "class of second"], lines)
    if not pairs:
        return f"{place.name}: no pair, {table}"
    tiles = [
        [
            Tile(a.paths[one], [f"{cosine:.4f}", a.classes[one]], reading=reading_of(first)),
            Tile(b.paths[other], ["", b.classes[other]], reading=reading_of(second)),
        ]
        for one, other, cosine in pairs[:SHOWN_PAIRS]
    ]
    rows = [sum(tiles[start : start + PAIRS_IN_A_ROW], []) for start in range(0, len(tiles), PAIRS_IN_A_ROW)]
    write_sheet(sheet, rows, ["pairs, side by side"] + [""] * (len(rows) - 1), images)
    return f"{place.name}: {len(pairs)} pairs in {table}, {sheet.name}"


def write_clusters(folder: Path, found: Embeddings, clusters: Clusters, images: Path | None) -> str:
    """Write clusters.csv (path, cluster, distance to the center, class) and clusters.png (a row for each cluster)."""
    paths, names = found.columns.paths, found.columns.classes
    lines = [
        [paths[row], int(clusters.number[row]), f"{clusters.distance[row]:.6f}", names[row]] for row in clusters.order
    ]
    _write_csv(folder / "clusters.csv", ["path", "cluster", "distance", "class"], lines)
    tiles, titles = [], []
    for place in range(min(clusters.metrics["count"], SHOWN_CLUSTERS)):
        members = [row for row in clusters.order if clusters.number[row] == place]
        tiles.append([Tile(paths[row], [names[row]], reading=reading_of(found)) for row in members[:SHOWN_MEMBERS]])
        known = [names[row] for row in members if names[row]]
        most = max(set(known), key=lambda name: (known.count(name), name)) if known else ""
        purity = f", {known.count(most) / len(known):.0%} {most}" if known else ""
        titles.append(f"cluster {place}: {counted(len(members), 'image')}{purity}")
    write_sheet(folder / "clusters.png", tiles, titles, images)
    return f"{clusters.metrics['count']} clusters: {folder}/clusters.csv, clusters.png"


def figures(metrics: dict[str, Any]) -> str:
    """The plain numbers among the metrics in one line: `rankme 41.2, uniformity -2.1`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([safe_cell(cell) for cell in row] for row in rows)

    write_atomically(path, write)
