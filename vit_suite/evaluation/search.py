"""The nearest rows of a bank, exactly: candidates from quick products that round, then exact similarities of the
candidates alone.

The similarity of two rows is the dot product of the unit rows, rounded once, to float32. For that, unit rows lie on a
grid of 2^-26, as float32 numbers from 1/8 up do anyway: products of two entries are multiples of 2^-52 and all sums of
them stay below 2, so float64 holds them exactly, in whatever order they are summed. Similarities and neighbours of the
same unit rows are therefore the same bit for bit on every machine, and however the search is cut up or shared; of equal
similarities the lower row comes first. (The grid moves a similarity by about 1e-8; a float32 product of the same rows
errs by up to 1e-6, which is enough to change the order of near neighbours.)

Candidates come from a product in bf16, on a CPU where that is native, whose error has a proven bound (`Bank._error`).
The queries for which the bound leaves too many of them are searched again in float32, and at last, where a bank repeats
a row very often, in float64. A GPU begins with float32: what its bf16 units keep of a sum is not documented to the last
bit, and the bound was not tried there.

Axes: N bank rows, Q queries, D feature width, B bank rows of a chunk, G of a group, n candidates, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.hardware import native_bf16

GRID = 2.0**26
"""Steps of the grid between 0 and 1."""
GROUP = 16
"""The most similarities of which only the largest is looked at, unless it is a candidate."""
PART, SLICE = 2**20, {"cpu": 2**17, "cuda": 2**24}
"""Numbers of bank rows that are made ready at a time for a product, and for exact similarities: a CPU keeps them in its
cache, a GPU wants fewer calls."""


class Bank:
    """Rows (N, D) that are searched. They stay where they are; chunks of `columns` of them are brought to `device`.

    `numbers` (N,): the numbers of the rows, ascending. `k`: the neighbours that are looked for; all rows, where there
    are fewer.
    """

    def __init__(self, rows: Tensor, numbers: Tensor, k: int, columns: int, device: torch.device) -> None:
        self.rows, self.numbers, self.k, self.device = rows, numbers, min(k, len(rows)), device
        self.columns, self.part = columns, min(columns, max(256, PART // rows.shape[1]))
        self.group = max(1, min(GROUP, columns // (2 * k)))
        # A candidate costs about as much as 64 rows of a product, or more. This also bounds the memory of the
        # candidates.
        self.limit = 2 * k + columns // 64
        self.unit = all(bool(is_unit(part.to(device)).all()) for part in rows.split(self.part))
        # The mean changes all similarities of a query alike, so it is taken off: the shorter the rows, the smaller the
        # errors.
        self.mean = self._unit(rows[:: len(rows) // 4096 + 1]).mean(0)
        self.radius, self.residual = 0.0, {torch.bfloat16: 0.0} if device.type == "cpu" and native_bf16(device) else {}
        self.residual[torch.float32] = 0.0
        for part in rows.split(self.part) if len(rows) else ():
            exact = self._less_mean(self._unit(part), torch.float32)
            self.radius = max(self.radius, float(exact.norm(dim=1).max()))
            for dtype, largest in self.residual.items():
                self.residual[dtype] = max(largest, float((exact - exact.to(dtype)).norm(dim=1).max()))

    def nearest(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(similarities, row numbers) (Q, k) of the rows most similar to each query (Q, D), most similar first, then by
        number.

        `own` (Q,): the number of the row that IS the query and is left out; where only that one is missing, its
        similarity is -inf.
        """
        queries = _steps(unit_rows(queries)) / GRID
        similarities = queries.new_empty(len(queries), self.k)
        places = torch.empty_like(similarities, dtype=torch.long)
        own = self._places(own, len(queries))
        left = torch.arange(len(queries), device=self.device)
        for dtype in tuple(self.residual):
            if len(left):
                found, settled = self._candidates(queries[left], own[left], dtype)
                best = self._best(queries[left], *found)
                similarities[left[settled]], places[left[settled]] = (part[settled] for part in best)
                left = left[~settled]
                if 2 * len(left) > len(
                    settled
                ):  # the next queries are likely to be like these: then it costs more than it saves
                    del self.residual[dtype]
        if len(left):
            similarities[left], places[left] = self._exact(queries[left], own[left])
        return similarities, self.numbers[places]

    def _places(self, own: Tensor | None, count: int) -> Tensor:
        """Where in the bank the rows of these numbers are, -1 for what is not there."""
        nowhere = torch.full((count,), -1, device=self.device)
        if own is None or not len(self.numbers):
            return nowhere
        places = torch.searchsorted(self.numbers, own).clamp(max=len(self.numbers) - 1)
        return torch.where(self.numbers[places] == own, places, nowhere)

    def _unit(self, rows: Tensor) -> Tensor:
        """Some of the rows, brought to the device and to unit length."""
        rows = rows.to(self.device)
        return rows.float() if self.unit else unit_rows(rows)

    def _less_mean(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Unit rows as products for candidates take them."""
        return torch.sub(rows, self.mean, out=torch.empty_like(rows, dtype=dtype))

    def _parts(self, start: int) -> Iterator[tuple[slice, Tensor]]:
        """The chunk of `columns` rows from `start`, in parts: (which columns, unit rows)."""
        end = min(start + self.columns, len(self.rows))
        for first in range(start, end, self.part):
            last = min(first + self.part, end)
            yield slice(first - start, last - start), self._unit(self.rows[first:last])

    def _error(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q, 1): by how much similarity - query . mean and a product with `_less_mean`, before that is rounded to
        `dtype`, differ at most.

        By Cauchy-Schwarz, of rounding the query: |q - q'| |b'|; of rounding the rows: |q| |b - b'|; of summing D
        products in float32,
        in any order, truncated or rounded: D 2^-23 |q'| |b'|. Of the grid: 2^-27 sqrt(D) |q|; of other roundings to
        float32: 2^-20.
        A hundredth more is for the rounding of these norms.
        """
        width, reach = queries.shape[1], self.radius + self.residual[dtype]
        lost = (queries - queries.to(dtype)).norm(dim=1, keepdim=True)
        return 1.01 * ((lost + width * 2**-23) * reach + self.residual[dtype] + 2**-27 * width**0.5 + 2**-20)

    def _candidates(self, queries: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((query, place) (n,) each of candidates, whether those of a query hold its k nearest (Q,)).

        At least k rows have a product of at least t, the k-th largest that was met, so k similarities are at least t -
        |rounding of t| - error, and the product of a row that reaches that is not below t - |rounding of t| - 2 error
        (rounding keeps the order). Of each group of similarities only the largest is compared, until one is found to be
        a candidate.
        """
        error, rounded = self._error(queries, dtype), queries.to(dtype)
        unit = torch.finfo(dtype).eps / 2
        buffer = rounded.new_empty(len(queries) * (self.columns + self.group))
        best = rounded.new_full((len(queries), self.k), -torch.inf)
        settled = torch.ones_like(own, dtype=torch.bool)
        found = own.new_empty(0), own.new_empty(0), rounded.new_empty(0)
        for start in range(0, len(self.rows), self.columns):
            grouped = self._products(rounded, own, start, buffer)
            largest = grouped.amax(1)
            best = torch.cat([best, largest.topk(min(self.k, largest.shape[1])).values], 1).topk(self.k).values
            kth = best[:, -1:].float()
            cut = (
                (kth - unit * kth.abs() - 2 * error).to(dtype).clamp(min=torch.finfo(dtype).min)
            )  # above what is left out
            kept = found[2] >= cut[found[0], 0]
            found = found[0][kept], found[1][kept], found[2][kept]
            room = torch.where(settled, self.limit - torch.bincount(found[0], minlength=len(queries)), -1)
            (query, column, product), settled = _members(grouped, largest, cut, room)
            new = query, start + column, product
            found = torch.cat([found[0], new[0]]), torch.cat([found[1], new[1]]), torch.cat([found[2], new[2]])
            if not settled.any():
                break
        return found[:2], settled

    def _products(self, queries: Tensor, own: Tensor, start: int, buffer: Tensor) -> Tensor:
        """Products of rounded queries and the chunk from `start`, in `buffer`: (Q, G, B / G), padded to whole groups
        with -inf.

        Group g has the rows g, g + B / G, ... of the chunk, so that rows in the order of their classes spread over
        groups.
        """
        count = min(self.columns, len(self.rows) - start)
        width = -(-count // self.group) * self.group
        products = buffer[: len(queries) * width].view(len(queries), width)
        for columns, rows in self._parts(start):
            torch.mm(queries, self._less_mean(rows, queries.dtype).T, out=products[:, columns])
        products[:, count:] = -torch.inf
        _leave_out(products, own - start)
        return products.unflatten(1, (self.group, -1))

    def _best(self, queries: Tensor, query: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The k most similar of these pairs for each query: (similarities, places) (Q, k), -inf where there are
        fewer."""
        order = place.argsort()  # so that a row is fetched once for all of its queries
        query, place, exact = query[order], place[order], queries.new_empty(len(query))
        scaled, size = queries.double() / GRID, max(1, SLICE[self.device.type] // queries.shape[1])
        for of, at, similarity in zip(query.split(size), place.split(size), exact.split(size), strict=True):
            rows = _steps(self._unit(self.rows.index_select(0, at.to(self.rows.device))))
            similarity.copy_(scaled.index_select(0, of).mul_(rows).sum(1))
        order = query.argsort(stable=True)
        query, place, exact = query[order], place[order], exact[order]
        count = torch.bincount(query, minlength=len(queries))
        column = torch.arange(len(query), device=self.device) - (count.cumsum(0) - count)[query]
        similarities = queries.new_full((len(queries), max(self.k, int(count.max()))), -torch.inf)
        places = torch.zeros_like(similarities, dtype=torch.long)
        similarities[query, column], places[query, column] = exact, place
        similarities, columns = stable_topk(similarities, self.k)
        return similarities, places.gather(1, columns)

    def _exact(self, queries: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """(similarities, places) (Q, k) of the nearest of all rows."""
        best = queries.new_empty(len(queries), 0)
        places = torch.empty_like(best, dtype=torch.long)
        for start in range(0, len(self.rows), self.columns):
            similarities = queries.new_empty(len(queries), min(self.columns, len(self.rows) - start))
            for columns, rows in self._parts(start):
                similarities[:, columns] = queries.double() / GRID @ _steps(rows).double().T  # rounded as it is written
            _leave_out(similarities, own - start)
            values, indices = stable_topk(similarities, min(self.k, similarities.shape[1]))
            # Chunks come in bank order, so a stable sort of (earlier, later) keeps the lower number first among equals.
            best, order = torch.cat([best, values], 1).sort(dim=1, descending=True, stable=True)
            best, places = best[:, : self.k], torch.cat([places, indices + start], 1).gather(1, order)[:, : self.k]
        return best, places


def _leave_out(similarities: Tensor, columns: Tensor) -> None:
    """Set one column (Q,) of each row of (Q, B) to -inf, none where it lies outside."""
    here = ((columns >= 0) & (columns < similarities.shape[1])).nonzero()[:, 0]
    similarities[here, columns[here]] = -torch.inf


def _members(
    grouped: Tensor, largest: Tensor, cut: Tensor, room: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((query, column, value) (n,) each of what is not below the `cut` (Q, 1) of its query; which queries have not more
    than `room` (Q,) of it: the others are left out).

    `grouped` (Q, G, B / G): `Bank._products`; `largest` (Q, B / G): of each group.
    """
    flagged = largest >= cut
    fits = flagged.sum(1) <= room  # before anything is gathered: memory
    query, group = (flagged & fits[:, None]).nonzero(as_tuple=True)
    values = grouped[query, :, group]  # (flagged groups, G)
    reached = values >= cut[query]
    fits &= torch.zeros_like(room).index_add_(0, query, reached.sum(1)) <= room
    which, member = (reached & fits[query, None]).nonzero(as_tuple=True)
    return (query[which], member * grouped.shape[2] + group[which], values[which, member]), fits


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k, dim=1)` of (Q, B) floats, sorted, where equal values come in the order of their column, and the
    lowest columns are taken when the cut falls among equals. torch.topk promises neither; a full stable sort is many
    times slower."""
    width = values.shape[1]
    top, indices = values.topk(min(k + 1, width), dim=1)
    if k < width:
        cut = top[:, k] == top[:, k - 1]  # the (k+1)-th equals the k-th: which of them were taken was left to chance
        top, indices = top[:, :k], indices[:, :k]
        indices = indices.clone()
        for rows in cut.nonzero()[:, 0].split(64):  # not all at once: memory
            indices[rows] = _first_of_equals(values[rows], top[rows, k - 1 : k], k)
    indices = indices.sort(dim=1).values
    top, order = values.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return top, indices.gather(1, order)


def _first_of_equals(values: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Columns (rows, k), ascending, of all values above the k-th largest and of the first ones that equal it."""
    above = values > threshold
    equal = values == threshold
    missing = k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(values), k)


def is_unit(rows: Tensor) -> Tensor:
    """Whether each row has unit length already, (rows, 1)."""
    return (rows.double().norm(dim=1, keepdim=True) - 1).abs() < 1e-5


def unit_rows(rows: Tensor) -> Tensor:
    """float32 rows of unit length; rows that already are pass through bit for bit (a zero row stays zero).

    Divided in float64 and rounded once, so that the order in which a norm is summed up does not show.
    """
    return torch.where(is_unit(rows), rows.float(), functional.normalize(rows.double(), dim=1).float())


def _steps(rows: Tensor) -> Tensor:
    """The nearest points of the grid, in steps: whole numbers."""
    return (rows * GRID).round_()


@contextmanager
def plain_products(device: torch.device) -> Iterator[None]:
    """Matrix products as they are written: no autocast, no TF32 and no bf16 passes for float32."""
    mkldnn: Any = torch.backends.mkldnn
    settings = torch.backends.cuda.matmul, mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
