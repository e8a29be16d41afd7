"""Calibration error against an example worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vit_suite.evaluation.calibration import expected_calibration_error, negative_log_likelihood, reliability


def logits(*confidences: float) -> torch.Tensor:
    """Two classes; class 0 has the confidence."""
    return torch.tensor([[math.log(p), math.log(1 - p)] for p in confidences], dtype=torch.float64)


def test_by_hand():
    """Bins of a fifth. 0.55, 0.58: bin (0.4, 0.6], one right of two, |0.5 - 0.565| = 0.065. 0.9, 0.95, 0.99, 0.84: bin
    (0.8, 1], three right of four, |0.75 - 0.92| = 0.17. ECE = 2/6 0.065 + 4/6 0.17 = 0.135."""
    table = logits(0.55, 0.58, 0.9, 0.95, 0.99, 0.84)
    labels = torch.tensor([0, 1, 0, 0, 0, 1])
    assert expected_calibration_error(table, labels, bins=5) == pytest.approx(2 / 6 * 0.065 + 4 / 6 * 0.17)
    counts, confidence, accuracy = reliability(table, labels, bins=5).unbind(1)
    assert counts.tolist() == [0, 0, 2, 0, 4]
    assert confidence[[2, 4]].tolist() == pytest.approx([0.565, 0.92]) and accuracy[[2, 4]].tolist() == pytest.approx(
        [0.5, 0.75]
    )


def test_an_edge_belongs_to_the_bin_below():
    table = logits(0.8, 0.81)
    assert reliability(table, torch.tensor([0, 0]), bins=5)[:, 0].tolist() == [0, 0, 0, 1, 1]


def test_the_extremes():
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert expected_calibration_error(sure, torch.tensor([0, 0])) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(sure, torch.tensor([1, 1])) == pytest.approx(1)
    assert expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(0)


def test_calibrated_guesses_have_a_small_error():
    """Labels drawn from the probabilities themselves."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(20000, 5, generator=generator) * 2
    labels = torch.multinomial(table.softmax(1), 1, generator=generator).squeeze(1)
    assert expected_calibration_error(table, labels) < 0.02
    assert expected_calibration_error(3 * table, labels) > 0.1  # the same guesses, too sure of themselves


def test_likelihood():
    assert negative_log_likelihood(logits(0.25, 0.5), torch.tensor([0, 1])) == pytest.approx(
        (math.log(4) + math.log(2)) / 2
    )
