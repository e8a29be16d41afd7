"""The learning rate of an epoch is that of timm's scheduler as DeiT's main.py steps it."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from vit_suite.config import OptimConfig
from vit_suite.optim.schedules import rate_of_epoch


@pytest.mark.parametrize("epochs", [12, 300])
def test_rate_of_epoch_is_deits(epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        assert rate_of_epoch(epoch, epochs, 1e-3, 1e-5, 5, 1e-6) == pytest.approx(expected, rel=1e-9)
        scheduler.step(epoch)


def test_two_epochs_at_rate_0_are_refused():
    assert "DeiT has 1e-6" in OptimConfig(rate_changes="epoch").problem()
    assert OptimConfig(rate_changes="epoch", warmup_start=1e-6).problem() is None
    assert OptimConfig(rate_changes="epoch", warmup_epochs=0).problem() is None


def test_without_warmup():
    assert rate_of_epoch(0, 10, 1e-3, 0.0, 0) == rate_of_epoch(1, 10, 1e-3, 0.0, 0) == 1e-3
