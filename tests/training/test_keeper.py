"""What the keeper refuses; when it writes is in tests/commands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vit_suite.config import SavingConfig
from vit_suite.training.keeper import Keeper


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_text("good")
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():
        network.bias[1] = float("nan")
    with pytest.raises(RuntimeError, match="not finite at step 7; last.ckpt stays as it was"):
        Keeper(tmp_path, SavingConfig()).save(SimpleNamespace(lightning_module=network, global_step=7), "last")
    assert last.read_text() == "good" and list(last.parent.iterdir()) == [last]


def test_gpus_act_on_the_answer_of_the_step_before(tmp_path, monkeypatch):
    """Which has arrived by then; one rank, and ranks on CPUs, act at once."""
    monkeypatch.setattr("vit_suite.distributed.largest", lambda values, device: lambda: values)
    signals = SimpleNamespace(noted=0)
    found = {}
    for name, active in (("one", False), ("many", True)):
        monkeypatch.setattr("vit_suite.distributed.active", lambda active=active: active)
        keeper, found[name] = Keeper(tmp_path, SavingConfig(), signals=signals), []
        for noted in (0, 10, 10, 10):
            signals.noted = noted
            keeper._agree(torch.device("cuda"))
            found[name].append(keeper.signal)
    assert found == {"one": [0, 10, 10, 10], "many": [0, 0, 10, 10]}


def test_ranks_that_resume_from_different_steps_are_refused(tmp_path, monkeypatch):
    """As they do where the run directory is on each machine's own disk."""
    monkeypatch.setattr(
        "vit_suite.distributed.largest", lambda values, device: lambda: [8, 0]
    )  # the other rank is at step 8
    with pytest.raises(
        RuntimeError, match="different steps, 0 to 8: is run.output on a file system that all machines share"
    ):
        Keeper(tmp_path, SavingConfig()).on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(device=None))
