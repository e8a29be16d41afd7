"""Top-k, confusion, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vit_suite.errors import UserError
from vit_suite.evaluation import calibration, classification
from vit_suite.evaluation.classification import classify, score_logits, top_accuracy

LOGITS = torch.tensor([[9.0, 1, 0, 0, 0, 0, 0], [0, 9, 8, 7, 6, 5, 4], [3, 2, 1, 0, 9, 5, 4]])


@dataclass
class Held:
    """As much of an image source as scoring takes."""

    labels: torch.Tensor
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


def test_top_k():
    assert top_accuracy(LOGITS, torch.tensor([0, 1, 4]), 1) == 100
    assert top_accuracy(LOGITS, torch.tensor([0, 5, 3]), 1) == pytest.approx(100 / 3)
    assert top_accuracy(LOGITS, torch.tensor([0, 5, 3]), 5) == pytest.approx(200 / 3)
    assert top_accuracy(LOGITS[:, :3], torch.tensor([2, 2, 2]), 5) == 100  # five of three


def test_confusion_counts_predictions_by_label():
    logits = torch.eye(3)[[0, 1, 1, 2]]
    labels = torch.tensor([0, 0, 1, 1])
    counts = score_logits(logits, labels, confusion=True).confusion
    assert score_logits(logits, labels).confusion is None
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_scores_agree_with_each_other():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 10, generator=generator), torch.randint(10, (500,), generator=generator)
    scores = score_logits(logits, labels, confusion=True)
    assert scores.confusion.sum() == scores.images == 500
    assert scores.top1 == pytest.approx(100 * float(scores.confusion.diag().sum()) / 500, abs=1e-4)
    assert scores.top1 < scores.top5 and scores.nll > 0 and 0 < scores.calibration_error < 1


def test_many_classes_and_images_are_scored_in_chunks_without_a_confusion_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 22, generator=generator), torch.randint(22, (500,), generator=generator)
    whole = score_logits(logits, labels, confusion=True)
    for module in (classification, calibration):
        monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(classification, "MOST_CONFUSED", 21)
    parts = score_logits(logits, labels, confusion=True)
    assert whole.confusion is not None and parts.confusion is None
    assert parts[:2] == whole[:2] and parts[2:4] == pytest.approx(whole[2:4], abs=1e-12)


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_outside_the_head_is_refused(label):
    with pytest.raises(UserError, match=f"label {label} of the scored images has no place in a head of 7 classes"):
        score_logits(LOGITS, torch.tensor([0, 1, label]))


def test_classify_scores_the_classifier_in_eval_mode():
    """A module that names the brightest channel, and drops everything while it trains."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    source = Held(labels, torch.zeros(6, 3, 4, 4, dtype=torch.uint8))
    source.images[torch.arange(6), labels] = 200
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(1.0)).train()
    module = SimpleNamespace(classifier=lambda: network, device=torch.device("cpu"), mean=[0.5] * 3, std=[0.25] * 3)
    scores = classify(module, source, [4, 4], 4, "fp32")
    assert scores.top1 == 100 and scores.nll < 0.1 and network.training
