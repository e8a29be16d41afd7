"""Weighted k-nearest-neighbour classification of frozen features.

The vote is that of Wu et al. 2018 (arXiv 1805.01978, section 3.4) as DINO's eval_knn.py computes it: a query's score
for class c is the sum of exp(similarity / temperature) over those of its k nearest bank rows whose label is c.
Deliberate deviations:

- the bank is searched in chunks too, not only the queries, so memory is bounded whatever the sizes; ranks may share it,
  each searches its rows for all queries, and the nearest of all are merged;
- a similarity is exact (`evaluation/search.py`), so neighbours and similarities of the same unit rows are the same bit
  for bit on every machine, with any memory and any number of ranks;
- votes are scattered by label instead of multiplied by a (k, classes) one-hot, so the number of classes is not a memory
  problem;
- the vote runs in float64 after subtracting the largest similarity: the ranking is the same, a small temperature cannot
  overflow;
- ties are resolved: between bank rows and between classes the lower index wins; a class without any vote is never a
  top-5 hit (the official sort leaves both to chance);
- k larger than the bank is clamped, and reported as clamped; few queries, few classes and few bank rows all work.

Axes: N bank rows, M queries, D feature width, C classes, K largest number of neighbours, Q and B rows of a query and a
bank chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.errors import UserError
from vit_suite.evaluation.search import Bank, plain_products

DEFAULT_MEMORY = 256 * 2**20
"""Bytes of working memory."""

_BYTES_PER_PAIR = 12
"""Of a (query, bank row) pair at the worst moment: product (4), candidates (4), and masks (4)."""


@dataclass
class KNNResult:
    """What `knn_classify` found. Dictionaries are keyed by the k that was asked for.

    top1, top5: percent of the queries whose label has the highest score, or one of the five highest; empty without
    query labels.
    predictions: (M,) int64, the class with the highest score.
    used_k: the k that was used: smaller than the key when the bank holds fewer rows.
    scores: (M, C) float64, sum of exp(similarity / temperature) by class, only with `return_scores`; infinite where it
        overflows float64 (temperature below 0.0014), which does not touch predictions.
    neighbours, similarities: (M, K) int64 bank rows and float32 cosines, most similar first, only with
    `return_neighbours`.
    """

    queries: int
    bank: int
    classes: int
    temperature: float
    used_k: dict[int, int]
    top1: dict[int, float] = field(default_factory=dict)
    top5: dict[int, float] = field(default_factory=dict)
    predictions: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    neighbours: Tensor | None = None
    similarities: Tensor | None = None

    @property
    def clamped(self) -> dict[int, int]:
        """{asked: used} for every k that is larger than the bank."""
        return {k: used for k, used in self.used_k.items() if used != k}

    @property
    def best_k(self) -> int:
        """The asked k with the highest top-1 (the smallest of equals)."""
        return max(sorted(self.top1), key=lambda k: self.top1[k])


def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor | None = None,
    *,
    ks: Iterable[int] = (10, 20, 100, 200),
    rows: Tensor | None = None,
    temperature: float = 0.07,
    classes: int | None = None,
    memory: int = DEFAULT_MEMORY,
    leave_one_out: bool = False,
    return_scores: bool = False,
    return_neighbours: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> KNNResult:
    """Classify `queries` (M, D) by a weighted vote of their nearest rows in `bank` (N, D), for every k of `ks` in one
    search.

    Rows are L2-normalized here unless they already have unit length. Similarities are exact cosines rounded to float32,
    whatever autocast or TF32 setting is active. `bank_labels` (N,) and `query_labels` (M,) are integers 0..classes-1;
    `classes` is the largest label + 1 when not given. `memory` bounds the working memory in bytes, on top of inputs and
    results. `leave_one_out` is for queries that ARE the bank, row for row: each then ignores itself. Work happens on
    `device`, the bank's own when not given.

    `rows` (n,), where ranks share the bank: which of its N rows `bank` (n, D) holds (`features.own_rows`); labels and
    queries are whole, and every rank calls this and gets the whole result.

    Raises UserError for empty, mismatched or non-finite inputs, labels outside 0..classes-1 (-1 means unlabeled), k <
    1, temperature <= 0, and a memory budget too small for a single query. Source: eval_knn.py `knn_classifier` of
    facebookresearch/dino.
    """
    total = len(bank) if rows is None else len(bank_labels)
    _check_rows(bank, queries, temperature, rows is not None)
    _check_leave_one_out(leave_one_out, total, len(queries))
    classes = _check_labels(bank_labels, query_labels, total, len(queries), classes)
    used = {k: min(k, total - int(leave_one_out)) for k in _check_ks(ks)}
    size, columns = chunk_sizes(len(queries), total, max(used.values()), classes, memory)
    device = torch.device(device) if device is not None else bank.device
    numbers = torch.arange(total, device=device) if rows is None else rows.to(device)
    parts: list[dict] = []
    with torch.no_grad(), plain_products(device):
        searched = Bank(bank, numbers, max(used.values()), columns, device)
        for start in _steps(len(queries), size, progress):
            chunk = queries[start : start + size].to(device)
            own = torch.arange(start, start + len(chunk), device=device) if leave_one_out else None
            similarities, neighbours = searched.nearest(chunk, own)
            if rows is not None:
                similarities, neighbours = _merge(similarities, neighbours, max(used.values()))
            truth = None if query_labels is None else query_labels[start : start + size].to(device)
            labels = bank_labels[neighbours.to(bank_labels.device)].to(device).long()  # (Q, K)
            part = _vote(similarities, labels, used, temperature, classes, truth, return_scores)
            if return_neighbours:
                part |= {"neighbours": neighbours.cpu(), "similarities": similarities.cpu()}
            parts.append(part)
    return _gather(KNNResult(len(queries), total, classes, float(temperature), used), parts)


def chunk_sizes(queries: int, bank: int, k: int, classes: int, memory: int) -> tuple[int, int]:
    """(query rows, bank rows) of a chunk so that similarities, candidates and votes stay within `memory` bytes."""
    # A query's candidates: about 2 k pairs (query 8, row 8, value 4 bytes), sorted, gathered, laid out. Its votes:
    # scores, comparisons.
    row = 160 * k + 16 * classes
    least = row + _BYTES_PER_PAIR * min(bank, 256)
    if memory < least:
        raise UserError(
            f"memory {memory} bytes is too small for one query of this search (k {k}, {classes} classes): give at least"
            f" {least}"
        )
    # Merging costs as much a bank chunk however short it is, so fewer queries are better than bank chunks of a few k.
    # More than 1024 queries gain nothing in the matrix product.
    rows = max(1, min(queries, 1024, memory // (row + _BYTES_PER_PAIR * min(bank, max(4096, 16 * k)))))
    return rows, min(bank, (memory - rows * row) // (rows * _BYTES_PER_PAIR))


def _merge(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what all ranks found, (Q, k) each, of equal values the lower row first; values and rows (Q, at most
    k) of one rank."""
    parts = distributed.gather_objects((values.cpu(), rows.cpu()))
    found, numbers = (torch.cat(column, 1).to(values.device) for column in zip(*parts, strict=True))
    numbers, order = numbers.sort(dim=1)
    found, best = found.gather(1, order).sort(dim=1, descending=True, stable=True)
    return found[:, :k], numbers.gather(1, best)[:, :k]


def _vote(
    similarities: Tensor,
    labels: Tensor,
    used: dict[int, int],
    temperature: float,
    classes: int,
    truth: Tensor | None,
    return_scores: bool,
) -> dict:
    """Predictions, ranks of the truth and (raw) scores of one query chunk for every k; labels (Q, K) are the
    neighbours'."""
    exponent = similarities.double() / temperature
    offset = exponent[:, :1]  # the largest; subtracting it scales a row's scores by a constant
    weights = (exponent - offset).exp()
    scores = weights.new_zeros(len(weights), classes)
    counted, by_size = 0, {}
    for size in sorted(set(used.values())):
        scores.scatter_add_(1, labels[:, counted:size], weights[:, counted:size])
        counted = size
        by_size[size] = {"prediction": scores.argmax(1).cpu()}  # argmax returns the first of equals
        if return_scores:
            by_size[size]["scores"] = (scores * offset.exp()).cpu()
        if truth is not None:
            own = scores.gather(1, truth[:, None].long())
            better = (scores > own).sum(1)
            earlier = torch.arange(classes, device=scores.device) < truth[:, None]
            rank = better + ((scores == own) & earlier).sum(1)
            by_size[size]["hit1"] = int((rank == 0).sum())
            by_size[size]["hit5"] = int(((rank < 5) & (own[:, 0] > 0)).sum())
    return {k: by_size[size] for k, size in used.items()}


def _gather(result: KNNResult, parts: list[dict]) -> KNNResult:
    """Join the query chunks into `result`."""
    for k in result.used_k:
        result.predictions[k] = torch.cat([part[k]["prediction"] for part in parts])
        if "scores" in parts[0][k]:
            result.scores[k] = torch.cat([part[k]["scores"] for part in parts])
        if "hit1" in parts[0][k]:
            result.top1[k] = 100.0 * sum(part[k]["hit1"] for part in parts) / result.queries
            result.top5[k] = 100.0 * sum(part[k]["hit5"] for part in parts) / result.queries
    if "neighbours" in parts[0]:
        result.neighbours = torch.cat([part["neighbours"] for part in parts])
        result.similarities = torch.cat([part["similarities"] for part in parts])
    return result


def _steps(total: int, step: int, progress: bool):
    """range(0, total, step), with a progress bar in queries when asked for."""
    if not progress or distributed.rank() != 0:
        yield from range(0, total, step)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="kNN", unit="query", leave=False) as bar:
        for start in range(0, total, step):
            yield start
            bar.update(min(step, total - start))


def _check_ks(ks: Iterable[int]) -> list[int]:
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
        broken, count = (
            sum(int((~part.isfinite().all(1)).sum()) for part in rows.split(4096)),
            len(rows),
        )  # in parts: memory
        if shared and name == "bank":  # what one rank finds, all have to say
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
