from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vit_suite.errors import UserError
from vit_suite.evaluation import knn, search
from vit_suite.evaluation.knn import KNNOptions, chunk_sizes, knn_classify
from vit_suite.evaluation.search import stable_topk


def features(rows, width=6, seed=0):
    return functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_force(bank, labels, queries, k, temperature, classes):
    """One query and one neighbour at a time, in float64: (scores (M, C), neighbours (M, k))."""
    similarities = (queries @ bank.T).double()
    scores, neighbours = torch.zeros(len(queries), classes, dtype=torch.float64), []
    for i, row in enumerate(similarities.tolist()):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
        neighbours.append(order)
        for j in order:
            scores[i, labels[j]] += torch.tensor(row[j] / temperature, dtype=torch.float64).exp()
    return scores, torch.tensor(neighbours)


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_for_any_sizes_and_chunks(seed):
    draw = torch.Generator().manual_seed(seed)
    bank_rows, query_rows, classes = (int(torch.randint(1, most, (1,), generator=draw)) for most in (90, 40, 12))
    ks = sorted({int(k) for k in torch.randint(1, 120, (3,), generator=draw)})
    bank, queries = features(bank_rows, seed=seed), features(query_rows, seed=seed + 100)
    labels = torch.randint(0, classes, (bank_rows,), generator=draw)
    truth = torch.randint(0, classes, (query_rows,), generator=draw)
    largest = min(max(ks), bank_rows)
    memory = 3 * (96 * largest + 16 * classes + 12 * min(bank_rows, 256))  # a few queries a chunk
    options = {"ks": ks, "temperature": 0.1, "classes": classes, "scores": True, "neighbours": True}
    for budget in ({}, {"memory": memory}):
        result = knn_classify(bank, labels, queries, truth, options=KNNOptions(**options, **budget))
        for k in ks:
            used = min(k, bank_rows)
            scores, neighbours = brute_force(bank, labels, queries, used, 0.1, classes)
            assert result.used_k[k] == used
            assert result.neighbours[:, :used].equal(neighbours)
            torch.testing.assert_close(result.scores[k], scores, rtol=1e-5, atol=0)
            assert result.predictions[k].equal(scores.argmax(1))
            assert result.top1[k] == pytest.approx(100 * (scores.argmax(1) == truth).double().mean().item())
            own = scores.gather(1, truth[:, None])
            hit = ((scores > own).sum(1) < 5) & (own[:, 0] > 0)
            assert result.top5[k] == pytest.approx(100 * hit.double().mean().item())
        assert result.used_k == {k: min(k, bank_rows) for k in ks}


def test_bank_chunks_merge_exactly(monkeypatch):
    bank, queries = features(500), features(30, seed=1)
    labels = torch.arange(500) % 7
    whole = knn_classify(bank, labels, queries, options=KNNOptions(ks=[5, 40], neighbours=True))
    for columns in (1, 7, 64, 499):
        monkeypatch.setattr(knn, "chunk_sizes", lambda *_, columns=columns: (11, columns))
        parts = knn_classify(bank, labels, queries, options=KNNOptions(ks=[5, 40], neighbours=True))
        assert parts.neighbours.equal(whole.neighbours)
        assert parts.predictions[40].equal(whole.predictions[40])


def test_chunks_stay_within_the_memory_budget(monkeypatch):
    largest = 0
    original = search.stable_topk

    def watch(values, k):
        nonlocal largest
        largest = max(largest, values.numel())
        return original(values, k)

    monkeypatch.setattr(search, "stable_topk", watch)
    memory = 2**20
    knn_classify(
        features(5000), torch.arange(5000) % 10, features(700, seed=1), options=KNNOptions(ks=[20], memory=memory)
    )
    assert 0 < largest * 12 <= memory
    for queries, rows, k, classes, budget in (
        (10**6, 10**7, 200, 1000, 2**28),
        (10**4, 10**6, 1000, 21841, 2**27),
        (3, 5, 2, 2, 10**6),
    ):
        query_rows, bank_rows = chunk_sizes(queries, rows, k, classes, budget)
        assert query_rows * (96 * k + 16 * classes + 12 * bank_rows) <= budget
        assert 1 <= query_rows <= queries and min(rows, k) <= bank_rows <= rows
    with pytest.raises(UserError, match="memory 1000 bytes is too small"):
        knn_classify(features(500), torch.zeros(500, dtype=torch.long), features(2), options=KNNOptions(memory=1000))


def test_ties_take_the_lower_index_and_the_lower_class():
    bank = features(1).repeat(50, 1)  # every row is the same, as after a collapse
    labels = torch.tensor([3, 1] * 25)
    result = knn_classify(bank, labels, bank[:4], options=KNNOptions(ks=[1, 2, 10], neighbours=True))
    assert result.neighbours.tolist() == [list(range(10))] * 4
    assert result.predictions[1].tolist() == [3] * 4
    assert result.predictions[2].tolist() == result.predictions[10].tolist() == [1] * 4


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_stable_topk_against_a_stable_sort(levels):
    values = torch.randint(0, levels, (40, 97), generator=torch.Generator().manual_seed(levels)).float()
    for k in (1, 5, 50, 96, 97):
        top, indices = stable_topk(values, k)
        expected, order = values.sort(dim=1, descending=True, stable=True)
        assert top.equal(expected[:, :k]) and indices.equal(order[:, :k])


def test_a_class_without_votes_is_no_top5_hit():
    bank, labels = features(20), torch.full((20,), 7)
    result = knn_classify(
        bank, labels, features(3, seed=1), torch.tensor([0, 1, 7]), options=KNNOptions(ks=[10], classes=8)
    )
    assert result.top1[10] == result.top5[10] == pytest.approx(100 / 3)


def test_small_sets_never_crash():
    one = knn_classify(features(1), torch.tensor([0]), features(1, seed=1), torch.tensor([0]))
    assert one.top1 == {10: 100.0, 20: 100.0, 100: 100.0, 200: 100.0} == one.top5
    assert one.used_k == {10: 1, 20: 1, 100: 1, 200: 1}
    few = knn_classify(
        features(7), torch.arange(7) % 3, features(2, seed=1), torch.tensor([0, 2]), options=KNNOptions(ks=3)
    )
    assert set(few.top5) == {3} and few.used_k == {3: 3}


def test_a_tiny_temperature_does_not_overflow():
    bank, queries = features(100), features(20, seed=1)
    labels = torch.arange(100) % 5
    result = knn_classify(bank, labels, queries, options=KNNOptions(ks=[10], temperature=0.001))
    nearest = labels[(queries @ bank.T).argmax(1)]  # so cold that the nearest row decides
    assert result.predictions[10].equal(nearest)


def test_leave_one_out_ignores_the_query_itself():
    bank, labels = features(60), torch.arange(60) % 4
    result = knn_classify(
        bank, labels, bank, labels, options=KNNOptions(ks=[5, 100], leave_one_out=True, neighbours=True, memory=40000)
    )
    assert not (result.neighbours[:, :59] == torch.arange(60)[:, None]).any()
    assert result.used_k == {5: 5, 100: 59}
    for i in range(60):
        others = torch.cat([torch.arange(i), torch.arange(i + 1, 60)])
        alone = knn_classify(bank[others], labels[others], bank[i : i + 1], options=KNNOptions(ks=[5]))
        assert int(alone.predictions[5]) == int(result.predictions[5][i])


def test_rows_are_normalized_and_autocast_is_ignored():
    bank, queries, labels = features(200), features(50, seed=1), torch.arange(200) % 9
    plain = knn_classify(bank, labels, queries, options=KNNOptions(ks=[20], scores=True))
    scaled = knn_classify(
        bank * 3, labels, queries * torch.rand(50, 1).add(0.5), options=KNNOptions(ks=[20], scores=True)
    )
    torch.testing.assert_close(scaled.scores[20], plain.scores[20], rtol=1e-4, atol=0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = knn_classify(bank, labels, queries, options=KNNOptions(ks=[20], scores=True))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert mixed.scores[20].equal(plain.scores[20])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank_labels": torch.tensor([0, -1, 1, -1])}, "2 of 4 images of the kNN bank are unlabeled"),
        ({"query_labels": torch.tensor([-1, 0])}, "1 of 2 images of the kNN queries are unlabeled"),
        ({"bank_labels": torch.tensor([0, 1])}, r"one integer label a row \(4\)"),
        ({"bank_labels": torch.ones(4)}, "integer"),
        ({"bank_labels": None}, "integer label"),
        ({"classes": 1}, "label 1, but labels go from 0 to 0"),
        ({"ks": []}, "k must be"),
        ({"ks": [0, 5]}, "k must be"),
        ({"temperature": 0.0}, "above 0"),
        ({"bank": torch.zeros(0, 6), "bank_labels": torch.zeros(0, dtype=torch.long)}, "bank has no rows"),
        ({"queries": torch.zeros(0, 6), "query_labels": None}, "queries has no rows"),
        ({"queries": features(2, 5)}, "width 6, the queries of 5"),
        ({"bank": torch.full((4, 6), torch.nan)}, "4 of 4 features.*diverged"),
        ({"leave_one_out": True}, "leave_one_out"),
    ],
)
def test_wrong_input_is_one_clear_message(change, message):
    given = {
        "bank": features(4),
        "bank_labels": torch.tensor([0, 1, 1, 0]),
        "queries": features(2),
        "query_labels": torch.tensor([0, 1]),
    }
    with pytest.raises(UserError, match=message):
        given |= change
        options = KNNOptions(
            **{name: given.pop(name) for name in ("classes", "ks", "temperature", "leave_one_out") if name in given}
        )
        knn_classify(**given, options=options)
