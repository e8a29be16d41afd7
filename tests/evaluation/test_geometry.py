"""Numbers of a set of features against their definitions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from vit_suite.errors import UserError
from vit_suite.evaluation import geometry
from vit_suite.evaluation.geometry import Pair, alignment, alike, effective_rank, nearest_rows, rankme, uniformity


def made(rows: int = 60, width: int = 7) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_ranks_of_known_spectra():
    basis = torch.linalg.qr(made(40, 5))[0]  # 5 orthonormal columns
    assert rankme(basis) == pytest.approx(5, rel=1e-4)
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0])
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert rankme(basis * shares) == pytest.approx(math.exp(entropy), rel=1e-4)
    assert rankme(torch.ones(10, 4)) == pytest.approx(1, abs=1e-4)


def test_effective_rank_is_blind_to_what_all_rows_share():
    rows = torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]])
    assert effective_rank(rows) == pytest.approx(2) and effective_rank(rows + 100) == pytest.approx(2, rel=1e-6)
    assert rankme(rows + 100) < 1.2


def test_uniformity_and_alignment_by_brute_force():
    rows, labels = made(), torch.arange(60) % 4
    labels[:5] = -1
    unit = functional.normalize(rows.double(), dim=1)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    distances = {pair: float((unit[pair[0]] - unit[pair[1]]).square().sum()) for pair in pairs}
    mean = sum(math.exp(-2 * distance) for distance in distances.values()) / len(pairs)
    assert uniformity(rows) == pytest.approx(math.log(mean), rel=1e-5)
    same = [distances[i, j] for i, j in pairs if labels[i] == labels[j] >= 0]
    assert alignment(rows, labels) == pytest.approx(sum(same) / len(same), rel=1e-5)
    assert alignment(rows, torch.full((60,), -1)) is None


@pytest.mark.parametrize("block", [7, 2048])
def test_alike_pairs_by_brute_force(block, monkeypatch):
    monkeypatch.setattr(geometry, "BLOCK", block)
    rows = made(40, 3)
    unit = functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    expected = {(i, j) for i in range(40) for j in range(i + 1, 40) if cosines[i, j] >= 0.9}
    found = alike(rows, 0.9)
    assert {(pair.first, pair.second) for pair in found} == expected and len(found) == len(expected) > 5
    assert [pair.cosine for pair in found] == sorted((pair.cosine for pair in found), reverse=True)
    across = alike(rows[:15], 0.9, rows[15:])
    assert {(pair.first, pair.second) for pair in across} == {
        (i, j) for i in range(15) for j in range(25) if cosines[i, 15 + j] >= 0.9
    }


def test_equal_rows_are_alike_at_cosine_one():
    rows = torch.cat([made(5), made(5)[2:3] * 3])
    assert alike(rows, 1.0) == [Pair(2, 5, pytest.approx(1.0))]


def test_too_many_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "MOST_PAIRS", 10)
    with pytest.raises(UserError, match="over 10 pairs have a cosine of at least 0"):
        alike(torch.ones(8, 3), 0.0)


def test_nearest_leaves_the_query_itself_out():
    rows = made(30)
    unit = functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    own = torch.tensor([4, -1])
    values, places = nearest_rows(rows, rows[[4, 9]], 3, own)
    cosines[4, 4] = -2
    assert places.tolist() == [cosines[4].topk(3).indices.tolist(), cosines[9].topk(3).indices.tolist()]
    assert places[1, 0] == 9 and values[1, 0] == pytest.approx(1)
