"""Ranks that share features and a bank. Here they are threads; tests/cluster/test_ranks.py has processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from vit_suite import distributed
from vit_suite.errors import UserError
from vit_suite.evaluation import features, knn
from vit_suite.evaluation.features import FeatureOptions, Features, collect, own_rows, pick_rows
from vit_suite.evaluation.knn import KNNOptions, knn_classify

from .test_features import MEAN, STD, Source


@pytest.fixture
def ranks(monkeypatch):
    """`ranks(n, function)`: what `function()` returns on each of n ranks. Tiles have 4 rows."""
    monkeypatch.setattr(features, "TILE", 4)

    def call(count: int, function) -> list:
        place, meeting, given = threading.local(), threading.Barrier(count, timeout=60), [None] * count

        def gather(value) -> list:
            given[place.rank] = value
            meeting.wait()
            found = list(given)
            meeting.wait()
            return found

        def start(rank: int):
            place.rank = rank
            return function()

        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda: getattr(place, "rank", 0))
            patch.setattr(distributed, "world_size", lambda: count)
            patch.setattr(distributed, "gather_objects", gather)
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(start, range(count)))

    return call


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_rank_gets_all_features_in_the_order_of_the_images(ranks, count, batch_size):
    """Eleven images, of which two do not decode; on seven ranks some have no batch."""
    source = Source(count=11, bad=(0, 7))

    def features_of(shared: bool) -> Features:
        options = FeatureOptions(batch_size, shared=shared)
        return collect(source, (8, MEAN, STD), lambda views: views.flatten(1)[:, :5], options)

    (whole,) = ranks(1, lambda: features_of(False))
    assert whole.indices.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10] and whole.rows is None
    for found in ranks(count, lambda: features_of(False)):
        assert (
            found.features.equal(whole.features)
            and found.labels.equal(whole.labels)
            and found.indices.equal(whole.indices)
        )
        assert [failure.path for failure in found.failures] == [failure.path for failure in whole.failures] and len(
            found.failures
        ) == 2
    parts = ranks(count, lambda: features_of(True))
    assert sum(len(part.features) for part in parts) == 9
    for part in parts if count > 1 else ():
        assert part.features.equal(whole.features[part.rows]) and part.labels.equal(whole.labels)


def test_what_one_rank_cannot_embed_stops_all(ranks):
    def embed(views):
        if distributed.rank() == 1:
            raise UserError("the features are not finite")
        return views.flatten(1)

    def attempt() -> str:
        with pytest.raises(UserError) as error:
            collect(Source(count=11), (8, MEAN, STD), embed, FeatureOptions(2))
        return str(error.value)

    assert ranks(3, attempt) == ["the features are not finite"] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 13])
def test_a_shared_bank_is_searched_as_a_whole(ranks, count):
    """Nine different rows, five times each: there are ties within ranks and between them, and ranks with fewer rows
    than k."""
    bank = functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1).repeat(5, 1)
    labels, queries = torch.arange(45) % 4, bank[:7].flip(1)
    options = {
        "ks": [2, 30, 60],
        "neighbours": True,
        "scores": True,
        "memory": 3 * (96 * 45 + 16 * 4 + 12 * 45),
    }

    def search(queries, **more):
        rows = own_rows(45)
        return knn_classify(
            bank[rows], labels, queries, labels[: len(queries)], rows=rows, options=KNNOptions(**options, **more)
        )

    for tested, more in ((queries, {}), (bank, {"leave_one_out": True})):
        whole = knn_classify(bank, labels, tested, labels[: len(tested)], options=KNNOptions(**options, **more))
        assert (whole.similarities[:, :-1] == whole.similarities[:, 1:]).any()
        for found in ranks(count, lambda tested=tested, more=more: search(tested, **more)):
            assert found.neighbours.equal(whole.neighbours) and found.similarities.equal(whole.similarities)
            assert found.scores[60].equal(whole.scores[60]) and found.top1 == whole.top1 and found.top5 == whole.top5
            assert found.used_k == whole.used_k and found.bank == 45


def test_merged_ties_take_the_lower_row(ranks):
    """Equal similarities within a rank and between ranks, and a rank that has nothing."""
    found = [([[0.9, 0.5, 0.5]], [[4, 1, 5]]), ([[0.9, 0.5]], [[2, 3]]), ([[]], [[]])]

    def merge():
        values, rows = found[distributed.rank()]
        return knn._merge(torch.tensor(values), torch.tensor(rows, dtype=torch.long), 4)

    for values, rows in ranks(3, merge):
        assert rows.tolist() == [[2, 4, 1, 3]] and values.tolist() == [pytest.approx([0.9, 0.9, 0.5, 0.5])]


def test_nan_on_one_rank_is_said_on_all(ranks):
    bank = torch.ones(12, 3)
    bank[5] = torch.nan

    def attempt() -> str:
        rows = own_rows(12)
        with pytest.raises(UserError) as error:
            knn_classify(bank[rows], torch.zeros(12, dtype=torch.long), torch.ones(1, 3), rows=rows)
        return str(error.value)

    assert ranks(3, attempt) == ["1 of 12 features of the kNN bank are NaN or infinite: the weights have diverged"] * 3


def test_ranks_keep_whole_tiles_of_almost_equal_number(ranks):
    for count in (2, 3, 13):
        kept = ranks(count, lambda: own_rows(45).tolist())
        assert sorted(sum(kept, [])) == list(range(45)) and max(map(len, kept)) - min(map(len, kept)) <= 4
        assert all(len({row // 4 for row in rows}) == -(-len(rows) // 4) for rows in kept)


def test_picked_rows_are_shared_anew(ranks):
    whole, chosen = torch.arange(44.0).view(22, 2), torch.tensor([0, 3, 4, 9, 10, 20])

    def pick() -> Features:
        own = own_rows(22)
        return pick_rows(Features(whole[own], torch.arange(22), torch.arange(22) + 100, [], own), chosen)

    parts = ranks(2, pick)
    assert [part.rows.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5]]
    for part in parts:
        assert (
            part.features.equal(whole[chosen][part.rows])
            and part.labels.equal(chosen)
            and part.indices.equal(chosen + 100)
        )


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_map_over_ranks_keeps_the_order(ranks, count):
    done = []

    def square(item: int) -> int:
        done.append(item)
        return item**2

    assert ranks(count, lambda: distributed.map_over_ranks(square, range(7))) == [[0, 1, 4, 9, 16, 25, 36]] * count
    assert sorted(done) == list(range(7))
