"""What a set of features looks like by itself: how many directions it fills, how evenly, and which rows are alike.

Axes: N images, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError
from vit_suite.evaluation.knn import DEFAULT_MEMORY, chunk_sizes
from vit_suite.evaluation.search import Bank, plain_products, unit_rows

SAMPLE = 8192
"""Rows whose pairs uniformity and alignment look at: 33 million pairs, two seconds on one core."""
BLOCK = 2048
"""Rows whose similarities are held at a time."""
SLACK = 1e-5
"""Above the error of a float32 product of two unit rows (1e-6 at D = 1024)."""
MOST_PAIRS = 1_000_000
"""Largest number of pairs that are listed."""


class Pair(NamedTuple):
    """Two rows that are alike."""

    first: int
    second: int
    cosine: float


def rankme(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, equations 1 and 2) of features (N, D): exp of the entropy of
    p_k = s_k / sum(s) + 1e-7 over the singular values s_k, between 1 and min(N, D)."""
    return _exp_entropy(_singular(features), 1e-7)


def effective_rank(features: Tensor) -> float:
    """Effective rank (Roy and Vetterli 2007, definition 2) of the centered features: in how many directions the images
    differ. RankMe counts the direction of the mean too."""
    return _exp_entropy(_singular(features.double() - features.double().mean(0)), 0.0)


def _singular(features: Tensor) -> Tensor:
    """Singular values in float64, from the eigenvalues of the smaller Gram matrix."""
    rows = features.double()
    gram = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


def _exp_entropy(values: Tensor, eps: float) -> float:
    total = values.sum()
    if not total > 0:
        return 1.0
    shares = values / total + eps
    return float((-torch.special.xlogy(shares, shares)).sum().exp())


def uniformity(features: Tensor, seed: int = 0) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit rows (Wang and Isola 2020, arXiv 2005.10242, section
    4.1.2): -4 at best, 0 when all rows are the same. More than `SAMPLE` rows are sampled at random."""
    rows, _ = _sample(features, None, seed)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), BLOCK):
        similarities = (rows[start : start + BLOCK] @ rows.T).double()
        total += (4 * similarities - 4).exp().sum()  # |x - y|^2 = 2 - 2 x.y
    pairs = len(rows) * (len(rows) - 1)
    return float(((total - len(rows)) / pairs).log()) if pairs else 0.0


def alignment(features: Tensor, labels: Tensor, seed: int = 0) -> float | None:
    """Mean of |x - y|^2 over pairs of unit rows of one class; None where no class has two. Lower is better.

    Deviation from Wang and Isola: their pairs are two views of one image. A file of embeddings has one view of each
    image, so the class says what belongs together.
    """
    rows, known = _sample(features, labels, seed)
    rows, known = rows[known >= 0], known[known >= 0]
    total, pairs = 0.0, 0
    for label in known.unique():
        members = rows[known == label].double()
        count = len(members)
        # The sum over ordered pairs of x.y is |sum of x|^2 less the own products.
        total += 2.0 * (count * (count - 1)) - 2.0 * float(members.sum(0).square().sum() - members.square().sum())
        pairs += count * (count - 1)
    return total / pairs if pairs else None


def _sample(features: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    rows = unit_rows(features)
    known = torch.full((len(rows),), -1) if labels is None else labels
    if len(rows) <= SAMPLE:
        return rows, known
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(stable_seed("geometry", seed)))
    chosen = chosen[:SAMPLE].sort().values
    return rows[chosen], known[chosen]


def nearest_rows(bank: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(cosines, row numbers), (Q, k) each, of the rows of `bank` (N, D) that are nearest to each query (Q, D).

    The search is exact; the most similar row comes first. `own` (Q,): the row that is the query itself, which is left
    out; -1 where there is none.
    """
    k = min(k, len(bank) - int(own is not None and len(bank) > 1))
    size, columns = chunk_sizes(len(queries), len(bank), k, 0, DEFAULT_MEMORY)
    found = []
    with torch.no_grad(), plain_products(bank.device):
        searched = Bank(bank, torch.arange(len(bank)), k, columns, bank.device)
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            found.append(searched.nearest(queries[part], None if own is None else own[part]))
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def alike(features: Tensor, cosine: float, others: Tensor | None = None) -> list[Pair]:
    """Pairs of rows whose cosine is at least `cosine`, the most similar first. UserError above `MOST_PAIRS` pairs.

    A pair is two rows of `features` (N, D), or with `others` (M, D) a row of each.
    """
    found = []
    rows, columns = unit_rows(features), None if others is None else unit_rows(others)
    for pair in _candidates(rows, columns, cosine - SLACK):
        other = rows if columns is None else columns
        exact = (rows[pair[0]].double() * other[pair[1]].double()).sum(1).float()
        kept = exact >= cosine
        found += [
            Pair(first, second, value)
            for first, second, value in zip(
                pair[0][kept].tolist(), pair[1][kept].tolist(), exact[kept].tolist(), strict=True
            )
        ]
        if len(found) > MOST_PAIRS:
            raise UserError(f"over {MOST_PAIRS:,} pairs have a cosine of at least {cosine:g}; give a larger --cosine.")
    return sorted(found, key=lambda pair: (-pair.cosine, pair.first, pair.second))


def _candidates(rows: Tensor, columns: Tensor | None, least: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(row numbers, column numbers) of the products that reach `least`, block by block."""
    with torch.no_grad(), plain_products(rows.device):
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            first = start if columns is None else 0
            other = rows if columns is None else columns
            for left in range(first, len(other), BLOCK):
                place = ((block @ other[left : left + BLOCK].T) >= least).nonzero()
                row, column = place[:, 0] + start, place[:, 1] + left
                kept = column > row if columns is None else torch.ones_like(row, dtype=torch.bool)
                yield row[kept], column[kept]


def normalized(features: Tensor) -> Tensor:
    """Unit rows in float64, for clustering by cosine."""
    return functional.normalize(features.double(), dim=1)
