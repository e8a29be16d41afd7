"""Against whole numbers: rows on the grid are integers, their products and sums too, so the reference has no rounding
of its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vit_suite.evaluation import search
from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.evaluation.search import Bank, plain_products, unit_rows

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.fixture(params=["bf16", "float32"])
def candidates_in(request, monkeypatch):
    """What a machine takes the products for candidates in."""
    if request.param == "bf16" and not search.native_bf16(CPU):
        pytest.skip("bf16 products are not native here")
    monkeypatch.setattr(search, "native_bf16", lambda device: request.param == "bf16")


def whole(rows):
    """Unit rows in steps of the grid."""
    return (unit_rows(rows).double() * 2**26).round().long()


def reference(queries, bank, k, own=None):
    """(similarities, rows) (Q, k), a stable sort of everything."""
    similarities = ((whole(queries) @ whole(bank).T).double() / 2**52).float()
    if own is not None:
        similarities[torch.arange(len(queries)), own] = -torch.inf
    similarities, rows = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], rows[:, :k]


def nearest(queries, bank, k, columns=None, own=None, device=CPU):
    with plain_products(torch.device(device)):
        searched = Bank(bank, torch.arange(len(bank), device=device), k, columns or len(bank), torch.device(device))
        return searched.nearest(queries.to(device), own)


def around(centers, spread, rows, generator):
    """Unit rows around directions (classes, D), the classes in order, as a folder of images a class has them."""
    labels = torch.randint(len(centers), (rows,), generator=generator).sort().values
    noise = torch.randn(rows, centers.shape[1], generator=generator) / centers.shape[1] ** 0.5
    return functional.normalize(centers[labels] + spread * noise, dim=1)


def made(name, rows, width):
    """(bank, 40 queries) with the structure that features have: at the start, when trained, when collapsed, and what
    files add."""
    draw = torch.Generator().manual_seed(width)
    centers = functional.normalize(torch.randn(10, width, generator=draw), dim=1)
    parts = {
        "noise": lambda n: torch.randn(n, width, generator=draw),
        "classes": lambda n: around(centers, 1.0, n, draw),
        "tight classes": lambda n: around(centers, 0.05, n, draw),
        "one direction": lambda n: around(centers[:1], 0.01, n, draw),
        "repeats": lambda n: centers[torch.randint(10, (n,), generator=draw)],
        "all equal": lambda n: centers[:1].repeat(n, 1),
        "zero rows": lambda n: around(centers, 1.0, n, draw) * (torch.arange(n) % 3 > 0)[:, None],
        "outlier": lambda n: torch.cat([around(centers[:1], 0.1, n - 1, draw), -centers[:1]]),
        "any length": lambda n: around(centers, 1.0, n, draw) * torch.rand(n, 1, generator=draw).mul(100),
        "few numbers": lambda n: torch.randint(-1, 2, (n, width), generator=draw).float(),
    }
    return parts[name](rows), parts[name](40)


NAMES = [
    "noise",
    "classes",
    "tight classes",
    "one direction",
    "repeats",
    "all equal",
    "zero rows",
    "outlier",
    "any length",
    "few numbers",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "width", "k"), [(3000, 48, 20), (700, 3, 1), (1500, 200, 150)])
def test_neighbours_and_similarities_are_exact(candidates_in, monkeypatch, name, rows, width, k):
    monkeypatch.setattr(search, "PART", 1)  # of 256 rows
    bank, queries = made(name, rows, width)
    values, found = reference(queries, bank, k)
    for columns in (rows, 640):
        similarities, neighbours = nearest(queries, bank, k, columns)
        assert neighbours.equal(found) and similarities.equal(values)


@pytest.mark.parametrize("name", NAMES)
def test_the_query_itself_is_left_out(candidates_in, name):
    bank, _ = made(name, 500, 24)
    for k in (7, 499):
        values, found = reference(bank, bank, k, torch.arange(500))
        similarities, neighbours = nearest(bank, bank, k, 256, torch.arange(500))
        assert neighbours.equal(found) and similarities.equal(values)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_neither_memory_nor_chunks_nor_shares_change_a_bit(candidates_in, device):
    bank, queries = made("tight classes", 2000, 40)
    values, found = reference(queries, bank, 12)
    for part, columns in ((1, 2000), (7, 300), (40, 64), (40, 13)):
        parts = [nearest(rows, bank.to(device), 12, columns, device=device) for rows in queries.split(part)]
        similarities, neighbours = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        assert neighbours.equal(found) and similarities.equal(values)
    options = {"ks": [12], "neighbours": True, "device": device}
    for memory in (2**28, 50_000):
        result = knn_classify(
            bank, torch.zeros(2000, dtype=torch.long), queries, options=KNNOptions(memory=memory, **options)
        )
        assert result.neighbours.equal(found) and result.similarities.equal(values)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", NAMES)
def test_products_err_less_than_the_bound(candidates_in, name, device):
    """Of any shape, down to one row and one column, which libraries multiply by other code."""
    bank, queries = (unit_rows(rows).to(device) for rows in made(name, 300, 48))
    for rows, count, width in ((300, 40, 48), (1, 1, 48), (2, 1, 5), (1, 40, 1), (33, 3, 17)):
        some, asked = unit_rows(bank[:rows, :width]), unit_rows(queries[:count, :width])
        with plain_products(some.device):
            searched = Bank(some, torch.arange(rows, device=device), 1, rows, some.device)
            for dtype in searched.residual:
                product = torch.mm(asked.to(dtype), searched._less_mean(some, dtype).T).double()
                exact = asked.double() @ (some.double() - searched.mean.double()).T
                allowed = searched._error(asked, dtype) + torch.finfo(dtype).eps / 2 * product.abs()
                assert ((product - exact).abs() <= allowed).all()


def reversed_by_bf16(count, scale=1.0, rest=(-0.359375,) * 4):
    """A query, and a bank whose best row (the last) bf16 puts behind `count` others, by nearly as much as the bound
    allows.

    Entries lie beside the middle of two bf16 numbers: those of the best row below, and all are rounded down; of the
    others 11 of 12 lie
    above and are rounded up, and the last is so much smaller that each is worse by a little. All else is exact in bf16:
    the query, `rest`, which sets how large the similarities are, and what the query does not see and makes rows of
    length 1. The rows are there with both signs, so that their mean is zero.
    """
    middle, little = scale * (0.125 + 2**-11), scale * 2**-14
    best = torch.full((1, 12), middle - little)
    others = torch.full((count, 12), middle + little)
    others[:, 11] -= little * (25 + torch.arange(count) / 4)
    rows = torch.cat([torch.cat([others, best]), torch.tensor([rest]).expand(count + 1, 4)], 1)
    for _ in range(4):
        missing = (1 - rows.double().square().sum(1, keepdim=True)).sqrt().float()
        rows = torch.cat([rows, (missing.view(torch.int32) >> 16 << 16).view(torch.float32)], 1)  # cut off to bf16
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-5
    return torch.cat([torch.full((1, 16), 0.25), torch.zeros(1, 4)], 1), torch.cat([-rows, rows])


LARGE = {"scale": 0.5, "rest": (0.359375,) * 3 + (0.359375 + 2**-8,)}
"""The best row is one bf16 number behind, while the bound of the sums alone is less than half the step between bf16
numbers."""


@pytest.mark.parametrize("kind", [{}, LARGE])
def test_a_row_that_bf16_puts_far_behind_is_found(kind):
    query, bank = reversed_by_bf16(5, **kind)  # so few that there is no second search
    rounded = (query.bfloat16() @ bank.bfloat16().T).float()
    assert int((rounded > rounded[0, -1]).sum()) == 5
    similarities, neighbours = nearest(query, bank, 3)
    values, found = reference(query, bank, 3)
    assert int(found[0, 0]) == 11
    assert neighbours.equal(found) and similarities.equal(values)


def test_the_bound_is_tight():
    """Of rounding the bank and of rounding the query: no smaller one would do."""
    query, rows = reversed_by_bf16(9)
    for queries, bank in ((query, rows), (rows, torch.cat([query, -query]))):
        searched = Bank(bank, torch.arange(len(bank)), 1, len(bank), CPU)
        exact, rounded = queries.double() @ bank.double().T, queries.bfloat16().double() @ bank.bfloat16().double().T
        searched.residual.setdefault(torch.bfloat16, float((bank - bank.bfloat16()).norm(dim=1).max()))
        share = (rounded - exact).abs() / searched._error(queries, torch.bfloat16)
        assert 0.85 < share.max() < 1  # sqrt(12 / 16) = 0.87: the roundings lie along 12 of the query's 16 entries


def test_candidates_stay_few(monkeypatch):
    """Not more than the limit of a query, whether they are in many groups or in one; those of the others are kept."""
    most, members, best = [], search._members, Bank._best

    def watch_members(*given):
        found, fits = members(*given)
        most.append(int(torch.bincount(found[0], minlength=1).max()))
        return found, fits

    def watch_best(self, queries, query, place):
        most.append(int(torch.bincount(query, minlength=1).max()))
        return best(self, queries, query, place)

    monkeypatch.setattr(search, "_members", watch_members)
    monkeypatch.setattr(Bank, "_best", watch_best)
    # The 16 rows of a group, all rows, two rows a chunk.
    for rows, columns in ((slice(0, 640, 40), 640), (slice(0, 640), 640), (slice(0, 640, 80), 160)):
        bank, queries = made("noise", 640, 30)
        bank[rows] = queries[0] = bank[0]
        most.clear()
        similarities, neighbours = nearest(queries, bank, 1, columns)
        values, found = reference(queries, bank, 1)
        assert neighbours.equal(found) and similarities.equal(values)
        assert max(most) <= 2 + columns // 64


@pytest.fixture
def tried(monkeypatch):
    """The searches that are made, and of how many queries each."""
    done, candidates, exact = [], Bank._candidates, Bank._exact

    def watch_candidates(self, queries, own, dtype):
        done.append(("bf16" if dtype == torch.bfloat16 else "float32", len(queries)))
        return candidates(self, queries, own, dtype)

    def watch_exact(self, queries, own):
        done.append(("float64", len(queries)))
        return exact(self, queries, own)

    monkeypatch.setattr(Bank, "_candidates", watch_candidates)
    monkeypatch.setattr(Bank, "_exact", watch_exact)
    return done


@pytest.mark.parametrize(
    ("bank", "first", "later"),
    [
        (reversed_by_bf16(4)[1], ["bf16"], ["bf16"]),
        (reversed_by_bf16(400)[1], ["bf16", "float32"], ["float32"]),  # more candidates than the limit
        (reversed_by_bf16(4)[1].repeat(200, 1), ["bf16", "float32", "float64"], ["float64"]),
    ],
)
def test_what_cannot_be_told_apart_is_searched_again(tried, bank, first, later):
    """And what did not help the first queries is not tried on the next."""
    if not search.native_bf16(CPU):
        pytest.skip("bf16 products are not native here")
    query, searched = reversed_by_bf16(1)[0], Bank(bank, torch.arange(len(bank)), 3, len(bank), CPU)
    values, found = reference(query, bank, 3)
    for expected in (first, later):
        tried.clear()
        similarities, neighbours = searched.nearest(query)
        assert neighbours.equal(found) and similarities.equal(values)
        assert tried == [(name, 1) for name in expected]


def test_one_hard_query_does_not_slow_the_others(tried, candidates_in):
    """Only what is left goes on to the next search."""
    bank, queries = made("classes", 2000, 40)
    bank[500:1000] = bank[500]
    queries[3] = bank[500]
    similarities, neighbours = nearest(queries, bank, 10)
    values, found = reference(queries, bank, 10)
    assert neighbours.equal(found) and similarities.equal(values)
    assert tried[0][1] == 40 and tried[-1][0] == "float64" and tried[-1][1] < 10


def test_candidates_that_better_ones_replace_do_not_count(tried, candidates_in):
    """The bank gets more similar to the queries from chunk to chunk."""
    similarity = torch.linspace(-0.9, 0.9, 400)
    query, bank = torch.tensor([[1.0, 0.0]]), torch.stack([similarity, (1 - similarity**2).sqrt()], 1)
    similarities, neighbours = nearest(query, bank, 10, 100)
    values, found = reference(query, bank, 10)
    assert neighbours.equal(found) and similarities.equal(values)
    assert len(tried) == 1


def test_settings_are_put_back():
    """Those that torch recommends, and the older one."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with plain_products(CPU):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        assert [setting.fp32_precision for setting in settings] == ["tf32", "bf16"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_layout_of_rows_does_not_show():
    """Rows that are not of unit length, in memory by rows and by columns."""
    bank, queries = 5 * torch.randn(300, 48), 5 * torch.randn(20, 48)
    by_columns = [rows.T.contiguous().T for rows in (queries, bank)]
    assert torch.equal(unit_rows(bank), unit_rows(by_columns[1]))
    assert nearest(queries, bank, 5)[0].equal(nearest(*by_columns, 5)[0])
