"""Draws of few labeled images, and heads trained on them."""

from __future__ import annotations

import statistics

import pytest
import torch

from tests.evaluation.test_linear import COLUMNS, ONE, blobs
from vit_suite.errors import UserError
from vit_suite.evaluation import fewshot
from vit_suite.evaluation.fewshot import Shots, Spread, draw_shots, few_shot_probe
from vit_suite.evaluation.linear import choose, linear_probe, split
from vit_suite.evaluation.linear_heads import Recipe


def test_every_class_gives_so_many_images_and_more_shots_contain_fewer():
    labels = torch.randint(0, 7, (500,), generator=torch.Generator().manual_seed(0))
    for draw in range(3):
        small, large = (draw_shots(labels, n, draw) for n in (2, 9))
        assert labels[small].bincount().tolist() == [2] * 7 and labels[large].bincount().tolist() == [9] * 7
        assert len(large.unique()) == 63 and set(small.tolist()) <= set(large.tolist())
        assert small.equal(draw_shots(labels, 2, draw))
    assert not draw_shots(labels, 2, 0).equal(draw_shots(labels, 2, 1))
    assert not draw_shots(labels, 2, 0).equal(draw_shots(labels, 2, 0, seed=1))


def test_every_image_is_as_likely():
    labels = torch.arange(40) % 2
    counts = torch.cat([draw_shots(labels, 5, draw) for draw in range(2000)]).bincount(minlength=40)
    assert counts.sum() == 20000 and (counts / 500 - 1).abs().max() < 0.2  # 500 expected, standard deviation 19


def test_a_class_that_is_too_small_is_named():
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 4)
    with pytest.raises(UserError, match="shots 5 is more than class 'cat' has labeled training images: 3"):
        draw_shots(labels, 5, 0, classes=["ant", "cat", "dog"])
    with pytest.raises(UserError, match="class 1 has labeled training images besides those held out: 3"):
        draw_shots(labels, 5, 0, where="training images besides those held out")
    with pytest.raises(UserError, match="shots 1 is more than class 'eel' has labeled training images: 0"):
        draw_shots(labels, 1, 0, classes=["ant", "cat", "dog", "eel"])


def test_spread():
    spread = Spread((10.0, 20.0, 60.0))
    assert spread.mean == 30 and spread.std == statistics.stdev([10, 20, 60]) and str(spread) == "30.00 ± 26.46"
    assert Spread((5.0,)).as_dict() == {"mean": 5.0, "std": 0.0, "draws": [5.0]}


def test_heads_see_their_shots_alone(monkeypatch):
    """Draws and held-out images do not touch; each head trains on n images a class; all settings of a draw train in the
    same."""
    train, seen = blobs(120, noise=2.0), []
    original = fewshot.stored
    monkeypatch.setattr(
        fewshot, "stored", lambda parts, labels, rows, *rest: seen.append(rows) or original(parts, labels, rows, *rest)
    )
    results = few_shot_probe(
        train, lambda: blobs(60, seed=5), Recipe((0.1, 1.0), 1, steps=5), columns=COLUMNS, shots=Shots([2, 6], 3)
    )
    held = set(split(train.labels, 0.1, 0)[1].tolist())
    assert [len(rows) for rows in seen] == [6] * 3 + [18] * 3 + [6] * 3 + [18] * 3  # choosing, then the winners again
    assert all(train.labels[rows].bincount().tolist() == [len(rows) // 3] * 3 for rows in seen)
    assert not held & {row for rows in seen for row in rows.tolist()}
    assert [rows.tolist() for rows in seen[:6]] == [rows.tolist() for rows in seen[6:]]
    assert len({tuple(rows.tolist()) for rows in seen}) == 6
    for result in results.values():
        assert len(result.top1.values) == 3 and len(result.held_out) == 4
        assert result.setting == choose(result.held_out).setting


def test_a_draw_scores_what_a_probe_on_its_images_scores():
    train, test = blobs(90, noise=2.0), blobs(60, noise=2.0, seed=5)
    recipe = Recipe((0.5,), 1, 64, steps=40)
    results = few_shot_probe(train, lambda: test, recipe, columns={ONE: [[1]]}, shots=Shots([4], 2))
    for draw, value in enumerate(results[4].top1.values):
        rows = draw_shots(train.labels, 4, draw)  # with one setting nothing is held out
        alone = train._replace(features=train.features[rows], labels=train.labels[rows], indices=rows)
        expected = linear_probe(alone, test, recipe, columns={ONE: [[1]]}).top1
        assert value == pytest.approx(expected, abs=1.7)  # batches hold the same images in another order
    assert results[4].held_out == []


def test_more_shots_score_higher():
    train, test = blobs(300, noise=3.0), blobs(300, noise=3.0, seed=5)
    results = few_shot_probe(
        train, lambda: test, Recipe((0.1, 1.0), 1, steps=40), columns=COLUMNS, shots=Shots([1, 30], 3)
    )
    assert results[30].top1.mean > results[1].top1.mean + 5 and results[1].top1.std > 0


def test_too_few_besides_the_held_out():
    with pytest.raises(
        UserError, match="shots 10 is more than class 'a' has labeled training images besides those held out: 9"
    ):
        few_shot_probe(
            blobs(30),
            lambda: blobs(9),
            Recipe((0.1, 1.0), 1),
            columns=COLUMNS,
            shots=Shots([10], 1, ["a", "b", "c"]),
        )
