"""Weighted k-nearest-neighbour classification of frozen features.

The vote is that of Wu et al. 2018 (arXiv 1805.01978, section 3.4) as DINO's eval_knn.py computes it: the score of class
c is the sum of exp(similarity / temperature) over those of a query's k nearest bank rows that have label c.
Deliberate deviations from eval_knn.py:

- Bank and queries are searched in chunks, so memory is bounded for any size. Ranks may share the bank: each searches
  its own rows for all queries, and the nearest rows of all ranks are merged.
- Similarities are exact (`evaluation/search.py`). The same unit rows give the same neighbours and similarities, bit for
  bit, on every machine, with any memory limit and any number of ranks.
- Votes are added up by label. The official code multiplies by a one-hot (k, classes), whose size grows with classes.
- The vote runs in float64 and subtracts the largest similarity first. The ranking stays the same, and a small
  temperature cannot overflow.
- Ties are resolved: the lower index wins, between bank rows and between classes. A class without a vote is never a
  top-5 hit. (The official sort leaves both to chance.)
- A k larger than the bank becomes the size of the bank, and the result says so.

Axes: N bank rows, M queries, D feature width, C classes, K the largest number of neighbours, Q queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.errors import UserError
from vit_suite.evaluation.features import moved
from vit_suite.evaluation.search import Bank, plain_products

DEFAULT_MEMORY = 256 * 2**20
"""Bytes of working memory."""

_BYTES_PER_PAIR = 12
"""Peak memory of one (query, bank row) pair: product (4), candidates (4), masks (4)."""
_BYTES_PER_NEIGHBOUR = 160
"""Peak memory of a query for each of its k neighbours: about 2 k candidates (query 8, row 8, value 4 bytes), which are
sorted, gathered and laid out."""
_BYTES_PER_CLASS = 16
"""Peak memory of a query for each class: a score (8) and a comparison (8)."""
_LEAST_ROWS = 256
"""Bank rows of a chunk at least."""
_WANTED_ROWS = 4096
"""Bank rows of a chunk that are worth having fewer queries for."""
_MOST_QUERIES = 1024
"""More queries at a time make the matrix product no faster."""


@dataclass(frozen=True)
class KNNOptions:
    """How `knn_classify` searches and votes."""

    ks: int | Iterable[int] = (10, 20, 100, 200)
    """Numbers of neighbours; one score each, from one search."""
    temperature: float = 0.07
    classes: int | None = None
    """The largest label + 1 when None."""
    memory: int = DEFAULT_MEMORY
    """Limit in bytes for the working memory, on top of inputs and results."""
    leave_one_out: bool = False
    """The queries ARE the bank, row for row: each query ignores itself."""
    scores: bool = False
    """Keep the (M, C) scores of every k in the result."""
    neighbours: bool = False
    """Keep the (M, K) neighbours and their similarities in the result."""
    device: torch.device | str | None = None
    """Where the search runs; the bank's own device when None."""


@dataclass
class KNNResult:
    """What `knn_classify` found. Dictionaries are keyed by the k that was asked for."""

    queries: int
    bank: int
    classes: int
    temperature: float
    used_k: dict[int, int]
    """The k that was used; smaller than the key when the bank has fewer rows."""
    top1: dict[int, float] = field(default_factory=dict)
    """Percent of the queries whose label has the highest score; empty without query labels."""
    top5: dict[int, float] = field(default_factory=dict)
    """Percent of the queries whose label is among the five highest scores."""
    predictions: dict[int, Tensor] = field(default_factory=dict)
    """(M,) int64: the class with the highest score."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """(M, C) float64, with `KNNOptions.scores`: sum of exp(similarity / temperature) by class. Infinite where it
    overflows float64 (temperature below 0.0014); predictions are right even then."""
    neighbours: Tensor | None = None
    """(M, K) int64 bank rows, most similar first, with `KNNOptions.neighbours`."""
    similarities: Tensor | None = None
    """(M, K) float32 cosines of the neighbours."""


class _Found(TypedDict, total=False):
    """What one query chunk found for one k."""

    prediction: Tensor
    scores: Tensor
    hit1: int
    hit5: int


@dataclass
class _Part:
    """What one query chunk found."""

    by_k: dict[int, _Found]
    neighbours: Tensor | None
    similarities: Tensor | None


def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor | None = None,
    options: KNNOptions | None = None,
    rows: Tensor | None = None,
) -> KNNResult:
    """Classify `queries` (M, D) by a weighted vote of their nearest rows in `bank` (N, D).

    Rows are L2-normalized here unless they already have length 1. Similarities are cosines, exact to the rounding to
    float32, whatever the autocast or TF32 settings. `bank_labels` (N,) and `query_labels` (M,) are integers from 0 to
    classes - 1.

    `rows` (n,) is for ranks that share the bank: `bank` (n, D) then holds these of the N rows (`features.own_rows`),
    while labels and queries are whole. Every rank makes the call and gets the whole result.

    Raises UserError for empty, mismatched or non-finite inputs, for labels outside 0..classes-1 (-1 means unlabeled),
    for k < 1 or temperature <= 0, and for a memory limit too small for one query. Source: `knn_classifier` in
    eval_knn.py of facebookresearch/dino.
    """
    options = options or KNNOptions()
    total = len(bank) if rows is None else len(bank_labels)
    _check_rows(bank, queries, options.temperature, rows is not None)
    _check_leave_one_out(options.leave_one_out, total, len(queries))
    classes = _check_labels(bank_labels, query_labels, total, len(queries), options.classes)
    used = {k: min(k, total - int(options.leave_one_out)) for k in _check_ks(options.ks)}
    result = KNNResult(len(queries), total, classes, float(options.temperature), used)
    size, columns = chunk_sizes(len(queries), total, max(used.values()), classes, options.memory)
    device = torch.device(options.device) if options.device is not None else bank.device
    numbers = torch.arange(total, device=device) if rows is None else rows.to(device)
    parts: list[_Part] = []
    with torch.no_grad(), plain_products(device):
        searched = Bank(moved(bank, device), numbers, max(used.values()), columns, device)
        for start in range(0, len(queries), size):
            chunk = queries[start : start + size].to(device)
            own = torch.arange(start, start + len(chunk), device=device) if options.leave_one_out else None
            similarities, neighbours = searched.nearest(chunk, own)
            if rows is not None:
                similarities, neighbours = _merge(similarities, neighbours, max(used.values()))
            truth = None if query_labels is None else query_labels[start : start + size].to(device)
            labels = bank_labels[neighbours.to(bank_labels.device)].to(device).long()  # (Q, K)
            found = _vote(similarities, labels, result, truth, options.scores)
            kept = (neighbours.cpu(), similarities.cpu()) if options.neighbours else (None, None)
            parts.append(_Part(found, *kept))
    return _gather(result, parts)


def chunk_sizes(queries: int, bank: int, k: int, classes: int, memory: int) -> tuple[int, int]:
    """(query rows, bank rows) of a chunk, so that similarities, candidates and votes stay within `memory` bytes."""
    row = _BYTES_PER_NEIGHBOUR * k + _BYTES_PER_CLASS * classes  # of a query, besides its products
    least = row + _BYTES_PER_PAIR * min(bank, _LEAST_ROWS)
    if memory < least:
        raise UserError(
            f"memory {memory} bytes is too small for one query of this search (k {k}, {classes} classes): give at least"
            f" {least}"
        )
    # Merging a bank chunk costs the same however short it is, so fewer queries are better than chunks of a few k rows.
    wanted = min(bank, max(_WANTED_ROWS, 16 * k))
    rows = max(1, min(queries, _MOST_QUERIES, memory // (row + _BYTES_PER_PAIR * wanted)))
    return rows, min(bank, (memory - rows * row) // (rows * _BYTES_PER_PAIR))


def _merge(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what all ranks found: (values, rows), (Q, k) each; of equal values the lower row comes first.

    `values` and `rows`, (Q, at most k) each, are what this rank found.
    """
    parts = distributed.gather_objects((values.cpu(), rows.cpu()))
    found, numbers = (torch.cat(column, 1).to(values.device) for column in zip(*parts, strict=True))
    numbers, order = numbers.sort(dim=1)
    found, best = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    return found[:, :k], numbers.gather(1, best)[:, :k]


def _vote(
    similarities: Tensor, labels: Tensor, result: KNNResult, truth: Tensor | None, keep_scores: bool
) -> dict[int, _Found]:
    """The vote of one query chunk for every k of `result`.

    similarities, labels (Q, K): of the neighbours, most similar first. truth (Q,): labels of the queries.
    """
    classes = result.classes
    exponent = similarities.double() / result.temperature
    offset = exponent[:, :1]  # the largest one; subtracting it scales all scores of a query by one factor
    weights = (exponent - offset).exp()
    scores = weights.new_zeros(len(weights), classes)
    counted = 0
    by_size: dict[int, _Found] = {}
    for size in sorted(set(result.used_k.values())):
        scores.scatter_add_(1, labels[:, counted:size], weights[:, counted:size])
        counted = size
        found: _Found = {"prediction": scores.argmax(1).cpu()}  # argmax returns the first of equals
        if keep_scores:
            found["scores"] = (scores * offset.exp()).cpu()
        if truth is not None:
            own = scores.gather(1, truth[:, None].long())
            better = (scores > own).sum(1)
            earlier = torch.arange(classes, device=scores.device) < truth[:, None]
            rank = better + ((scores == own) & earlier).sum(1)
            found["hit1"] = int((rank == 0).sum())
            found["hit5"] = int(((rank < 5) & (own[:, 0] > 0)).sum())
        by_size[size] = found
    return {k: by_size[size] for k, size in result.used_k.items()}


def _gather(result: KNNResult, parts: list[_Part]) -> KNNResult:
    """Join the query chunks into `result`."""
    for k in result.used_k:
        found = [part.by_k[k] for part in parts]
        result.predictions[k] = torch.cat([one["prediction"] for one in found])
        if "scores" in found[0]:
            result.scores[k] = torch.cat([one["scores"] for one in found])
        if "hit1" in found[0]:
            result.top1[k] = 100.0 * sum(one["hit1"] for one in found) / result.queries
            result.top5[k] = 100.0 * sum(one["hit5"] for one in found) / result.queries
    kept = [(part.neighbours, part.similarities) for part in parts]
    neighbours = [rows for rows, _ in kept if rows is not None]
    similarities = [values for _, values in kept if values is not None]
    if neighbours:
        result.neighbours, result.similarities = torch.cat(neighbours), torch.cat(similarities)
    return result


def _check_ks(ks: int | Iterable[int]) -> list[int]:
    asked = sorted({int(k) for k in ([ks] if isinstance(ks, int) else ks)})
    if not asked or asked[0] < 1:
        raise UserError(f"k must be one or more whole numbers from 1 up, not {list(asked)}")
    return asked


def _check_rows(bank: Tensor, queries: Tensor, temperature: float, shared: bool) -> None:
    if not temperature > 0:
        raise UserError(f"the kNN temperature must be above 0, not {temperature}")
    for name, rows in (("bank", bank), ("queries", queries)):
        if rows.ndim != 2:
            raise UserError(f"the kNN {name} must be (rows, width), not {tuple(rows.shape)}")
        # In parts, because a mask as large as the bank would cost memory.
        broken, count = sum(int((~part.isfinite().all(1)).sum()) for part in rows.split(4096)), len(rows)
        if shared and name == "bank":  # an error of one rank is raised on all
            broken, count = map(sum, zip(*distributed.gather_objects((broken, count)), strict=True))
        if count == 0:
            raise UserError(f"the kNN {name} has no rows")
        if broken:
            raise UserError(
                f"{broken} of {count} features of the kNN {name} are NaN or infinite: the weights have diverged"
            )
    if bank.shape[1] != queries.shape[1]:
        raise UserError(
            f"the kNN bank has features of width {bank.shape[1]}, the queries of {queries.shape[1]}: both must come"
            " from one backbone"
        )


def _check_leave_one_out(leave_one_out: bool, bank: int, queries: int) -> None:
    if leave_one_out and bank != queries:
        raise UserError(f"leave_one_out needs the bank itself as queries, not {queries} queries for {bank} bank rows")
    if leave_one_out and bank < 2:
        raise UserError("leave_one_out needs a bank of at least 2 rows")


def _check_labels(
    bank_labels: Tensor, query_labels: Tensor | None, bank: int, queries: int, classes: int | None
) -> int:
    """The number of classes; UserError when labels do not fit the rows or the classes."""
    given = [("bank", bank_labels, bank)] + ([] if query_labels is None else [("queries", query_labels, queries)])
    for name, labels, rows in given:
        if labels is None or tuple(labels.shape) != (rows,) or labels.is_floating_point():
            shape = None if labels is None else f"{tuple(labels.shape)} {labels.dtype}"
            raise UserError(f"the kNN {name} needs one integer label a row ({rows}), not {shape}")
        unlabeled = int((labels < 0).sum())
        if unlabeled:
            raise UserError(
                f"{unlabeled} of {rows} images of the kNN {name} are unlabeled (-1): kNN needs a labeled set"
            )
        if classes is not None and int(labels.max()) >= classes:
            raise UserError(f"the kNN {name} has label {int(labels.max())}, but labels go from 0 to {classes - 1}")
    return classes if classes is not None else max(int(labels.max()) for _, labels, _ in given) + 1
