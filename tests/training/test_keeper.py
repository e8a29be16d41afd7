"""What the keeper refuses; when it writes is in tests/commands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Trainer

from vit_suite.config import SavingConfig
from vit_suite.training.keeper import SIGTERM_BROADCAST, Keeper, stop_asking_for_sigterm


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


def test_the_clock_of_rank_0_joins_the_flags_that_are_agreed_anyway(tmp_path, monkeypatch):
    """One collective a step says all: the signal, saving.every_minutes, and the end of trainer.max_minutes."""
    asked = []
    monkeypatch.setattr("vit_suite.distributed.largest", lambda flags, device: asked.append(flags) or (lambda: flags))
    keeper = Keeper(tmp_path, SavingConfig(), max_minutes=10)
    keeper._agree(torch.device("cpu"))
    assert not keeper.over
    keeper.load_state_dict({"best": None, "seconds": 601.0})  # of earlier starts of the run
    keeper._agree(torch.device("cpu"))
    assert keeper.over and asked == [[0, 0, 0], [0, 0, 1]]
    assert keeper.state_dict()["seconds"] >= 601
    monkeypatch.setattr("vit_suite.distributed.rank", lambda: 1)  # whose clock does not count
    keeper._agree(torch.device("cpu"))
    assert not keeper.over


def test_the_hook_of_lightning_that_is_replaced_exists():
    """Its place is taken silently if Lightning renames it, and ranks would wait for each other before every batch."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    assert callable(getattr(type(loop), SIGTERM_BROADCAST))
    stop_asking_for_sigterm(trainer)
    assert getattr(loop, SIGTERM_BROADCAST)() is None
    without = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))
    with pytest.raises(RuntimeError, match=f"has no SimpleNamespace.{SIGTERM_BROADCAST}, which vit-suite replaces"):
        stop_asking_for_sigterm(without)
