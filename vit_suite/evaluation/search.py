"""The nearest rows of a bank, exactly: fast rounded products find candidates, then only these get exact similarities.

The similarity of two rows is the dot product of the unit rows, rounded once, to float32. Unit rows are first rounded to
a grid of 2^-26, on which float32 numbers from 1/8 up lie anyway. Then a product of two entries is a multiple of 2^-52,
and all sums of products stay below 2. So float64 holds the sum exactly, whatever the order of summation. The same unit
rows therefore give the same similarities and neighbours, bit for bit, on every machine and however the search is cut up
or shared. Of equal similarities the lower row comes first. (The grid moves a similarity by about 1e-8. A float32
product of the same rows errs by up to 1e-6, which is enough to change the order of close neighbours.)

On a CPU with native bf16, candidates come from a product in bf16, whose error has a proven bound (`Bank._error`). Some
queries then have too many candidates. They are searched again in float32 and, where a bank repeats a row very often, in
float64. A GPU begins with float32: its documentation does not say to the last bit what its bf16 units keep of a sum,
and the bound was not tried there.

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
"""Largest size of a group of similarities. The largest of a group is compared first; the others are looked at only when
it is a candidate."""
PART = 2**20
"""Numbers (rows x width) of the bank that are prepared together for a product: a CPU keeps them in its cache."""
SLICE = {"cpu": 2**17, "cuda": 2**24}
"""Numbers that are prepared together for exact similarities. A CPU keeps them in its cache; a GPU wants few calls."""
LEAST_ROWS = 256
"""Rows of a part at least: shorter products are slow."""
COSTLY = 64
"""Rows of a product that cost as much time as one candidate, or less."""
MEAN_ROWS = 4096
"""Rows, evenly spaced, that the mean of the bank is taken of."""
EQUAL_ROWS = 64
"""Rows of similarities in which equal values are ordered together; more would cost memory."""
UNIT_ERROR = 1e-5
"""A row whose length differs from 1 by less than this counts as a unit row: rounding to float32 moves it by 1e-7."""


class Bank:
    """Rows (N, D) that are searched. They stay on their device; `columns` rows at a time are copied to `device`.

    `numbers` (N,): the numbers of the rows, ascending. `k`: how many neighbours are looked for; all rows of a smaller
    bank.
    """

    def __init__(self, rows: Tensor, numbers: Tensor, k: int, columns: int, device: torch.device) -> None:
        self.rows, self.numbers, self.k, self.device = rows, numbers, min(k, len(rows)), device
        self.columns, self.part = columns, min(columns, max(LEAST_ROWS, PART // rows.shape[1]))
        self.group = max(1, min(GROUP, columns // (2 * k)))
        # Of more candidates than these, a search in the next higher precision is cheaper. It bounds their memory too.
        self.limit = 2 * k + columns // COSTLY
        self.unit = all(bool(is_unit(part.to(device)).all()) for part in rows.split(self.part))
        # Subtracting the mean changes all similarities of a query by the same amount, so their order stays. The rows
        # get shorter, and with them the errors.
        self.mean = self._unit(rows[:: len(rows) // MEAN_ROWS + 1]).mean(0)
        self.radius, self.residual = 0.0, {torch.bfloat16: 0.0} if device.type == "cpu" and native_bf16(device) else {}
        self.residual[torch.float32] = 0.0
        for part in rows.split(self.part) if len(rows) else ():
            exact = self._less_mean(self._unit(part), torch.float32)
            self.radius = max(self.radius, float(exact.norm(dim=1).max()))
            for dtype, largest in self.residual.items():
                self.residual[dtype] = max(largest, float((exact - exact.to(dtype)).norm(dim=1).max()))

    def nearest(self, queries: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(similarities, row numbers), (Q, k) each, of the rows most similar to each query (Q, D).

        The most similar row comes first; of equal ones the lower number. `own` (Q,): the number of the row that IS the
        query, which is left out. When fewer than k rows remain, it fills the last place with similarity -inf.
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
                if 2 * len(left) > len(settled):  # with queries like these, this precision costs time
                    del self.residual[dtype]
        if len(left):
            similarities[left], places[left] = self._exact(queries[left], own[left])
        return similarities, self.numbers[places]

    def _places(self, own: Tensor | None, count: int) -> Tensor:
        """Positions in the bank of the rows with these numbers; -1 for a number that the bank does not have."""
        nowhere = torch.full((count,), -1, device=self.device)
        if own is None or not len(self.numbers):
            return nowhere
        places = torch.searchsorted(self.numbers, own).clamp(max=len(self.numbers) - 1)
        return torch.where(self.numbers[places] == own, places, nowhere)

    def _unit(self, rows: Tensor) -> Tensor:
        """These rows on the device, with unit length."""
        rows = rows.to(self.device)
        return rows.float() if self.unit else unit_rows(rows)

    def _less_mean(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Unit rows less the mean of the bank, in the precision of a product for candidates."""
        return torch.sub(rows, self.mean, out=torch.empty_like(rows, dtype=dtype))

    def _parts(self, start: int) -> Iterator[tuple[slice, Tensor]]:
        """The chunk of `columns` rows from `start`, cut into parts: (columns of the chunk, unit rows)."""
        end = min(start + self.columns, len(self.rows))
        for first in range(start, end, self.part):
            last = min(first + self.part, end)
            yield slice(first - start, last - start), self._unit(self.rows[first:last])

    def _error(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """(Q, 1): an upper bound of |(similarity - query . mean) - (product with `_less_mean`)|, for each query.

        The product is meant before it is rounded to `dtype`. The bound is a sum, by Cauchy-Schwarz, with rounded values
        marked by a prime:

        - rounding the query: |q - q'| |b'|
        - rounding the rows: |q| |b - b'|
        - summing D products in float32, in any order, truncated or rounded: D 2^-23 |q'| |b'|
        - the grid: 2^-27 sqrt(D) |q|
        - other roundings to float32: 2^-20

        One percent is added for the rounding of these norms themselves.
        """
        width, reach = queries.shape[1], self.radius + self.residual[dtype]
        lost = (queries - queries.to(dtype)).norm(dim=1, keepdim=True)
        return 1.01 * ((lost + width * 2**-23) * reach + self.residual[dtype] + 2**-27 * width**0.5 + 2**-20)

    def _candidates(self, queries: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((query, place) of each candidate, (n,) each; bool (Q,): whether a query's candidates hold its k nearest).

        Let t be the k-th largest product so far. At least k rows have a product of t or more, so k similarities are at
        least t - |rounding of t| - error. A row that reaches this has a product of at least t - |rounding of t| -
        2 error, because rounding keeps the order. That is the cut. Of each group only the largest product is compared
        with it, until that one is a candidate.
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
            cut = (kth - unit * kth.abs() - 2 * error).to(dtype)
            cut = cut.clamp(min=torch.finfo(dtype).min)  # above -inf, the mark of a row that is left out
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
        """Products of the rounded queries and the chunk from `start`: (Q, G, B / G), padded to whole groups with -inf.

        They lie in `buffer`. Group g holds the rows g, g + B / G, ... of the chunk: where rows are sorted by class, the
        neighbours of a query then spread over groups.
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
        """The k most similar pairs of each query: (similarities, places), (Q, k) each; -inf where there are fewer."""
        order = place.argsort()  # so that a row is fetched once for all queries that it is a candidate of
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
        """(similarities, places), (Q, k) each, of the nearest of all rows, without candidates."""
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
    """Set one column of each row of (Q, B) to -inf: `columns` (Q,), where a number outside 0..B-1 sets none."""
    here = ((columns >= 0) & (columns < similarities.shape[1])).nonzero()[:, 0]
    similarities[here, columns[here]] = -torch.inf


def _members(
    grouped: Tensor, largest: Tensor, cut: Tensor, room: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((query, column, value), (n,) each, of the values that reach the `cut` (Q, 1) of their query; bool (Q,) fits).

    A query with more of them than `room` (Q,) does not fit, and its values are left out. `grouped` (Q, G, B / G) comes
    from `Bank._products`; `largest` (Q, B / G) is the largest of each group.
    """
    flagged = largest >= cut
    fits = flagged.sum(1) <= room  # checked before values are gathered, which takes memory
    query, group = (flagged & fits[:, None]).nonzero(as_tuple=True)
    values = grouped[query, :, group]  # (flagged groups, G)
    reached = values >= cut[query]
    fits &= torch.zeros_like(room).index_add_(0, query, reached.sum(1)) <= room
    which, member = (reached & fits[query, None]).nonzero(as_tuple=True)
    return (query[which], member * grouped.shape[2] + group[which], values[which, member]), fits


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k, dim=1)` of (Q, B) floats, sorted, in which of equal values the lowest columns are taken and come
    first. torch.topk does not promise that, and a full stable sort is many times slower."""
    width = values.shape[1]
    top, indices = values.topk(min(k + 1, width), dim=1)
    if k < width:
        cut = top[:, k] == top[:, k - 1]  # the k-th and the one after it are equal: torch took either
        top, indices = top[:, :k], indices[:, :k]
        indices = indices.clone()
        for rows in cut.nonzero()[:, 0].split(EQUAL_ROWS):
            indices[rows] = _first_of_equals(values[rows], top[rows, k - 1 : k], k)
    indices = indices.sort(dim=1).values
    top, order = values.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return top, indices.gather(1, order)


def _first_of_equals(values: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Columns (rows, k), ascending: those of all values above the k-th largest, and the first that equal it."""
    above = values > threshold
    equal = values == threshold
    missing = k - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(values), k)


def is_unit(rows: Tensor) -> Tensor:
    """bool (rows, 1): whether a row has unit length."""
    return (rows.double().norm(dim=1, keepdim=True) - 1).abs() < UNIT_ERROR


def unit_rows(rows: Tensor) -> Tensor:
    """float32 rows of unit length. A unit row passes through bit for bit; a zero row stays zero.

    Rows are divided in float64 and rounded once, so that the order of summation in the norm does not show.
    """
    return torch.where(is_unit(rows), rows.float(), functional.normalize(rows.double(), dim=1).float())


def _steps(rows: Tensor) -> Tensor:
    """Rows rounded to the grid, in whole steps of it."""
    return (rows * GRID).round_()


@contextmanager
def plain_products(device: torch.device) -> Iterator[None]:
    """Within it, matrix products have the precision of their inputs: no autocast, and no TF32 or bf16 for float32."""
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
