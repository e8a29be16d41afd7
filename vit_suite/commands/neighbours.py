"""`vit-suite neighbours`: what a file of embeddings says about its images, without a network."""

from __future__ import annotations

from pathlib import Path

from vit_suite.config import NeighboursConfig
from vit_suite.errors import UserError
from vit_suite.evaluation.embedding_files import read_embeddings
from vit_suite.evaluation.geometry import alike
from vit_suite.evaluation.neighbours import check_alike, find_clusters, find_queries, need_kmeans, numbers
from vit_suite.logs import speak
from vit_suite.places import check_new_folder
from vit_suite.reports.neighbours import figures, write_clusters, write_neighbours, write_pairs
from vit_suite.reports.results import append_result


def run(cfg: NeighboursConfig) -> None:
    """Write what the options ask for into `cfg.output`."""
    speak()
    found = read_embeddings(cfg.embeddings)
    other = None if cfg.leak is None else read_embeddings(cfg.leak)
    if other is not None:
        check_alike(found, other)
    queries = find_queries(cfg, found)
    if cfg.clusters is not None:
        if cfg.clusters > len(found):
            raise UserError(f"clusters {cfg.clusters} is more than '{cfg.embeddings}' has images: {len(found)}.")
        need_kmeans()
    folder = Path(cfg.output)
    check_new_folder("output", folder, cfg.overwrite)
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
    if cfg.clusters is not None:
        clusters = find_clusters(found, cfg.clusters, cfg.seed)
        metrics["clusters"] = clusters.metrics
        said.append(write_clusters(folder, found, clusters, images))
    protocol = {"embeddings": cfg.embeddings, "made_with": found.protocol, "images": len(found), "cosine": cfg.cosine}
    protocol |= {"leak": cfg.leak, "seed": cfg.seed}
    append_result(folder / "results.json", "embeddings", metrics, protocol, found.protocol.get("sha256"))
    print("\n".join([*said, figures(metrics), f"appended to {folder / 'results.json'}"]))
