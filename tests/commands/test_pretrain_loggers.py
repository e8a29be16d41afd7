"""The loggers of `vit-suite pretrain`: W&B and TensorBoard."""

from __future__ import annotations

import time

import pytest

from tests.commands.conftest import column
from vit_suite.training.keeper import Keeper
from vit_suite.training.stop import DRILL


def test_wandb_without_an_account_goes_on_with_its_run(pretrain, monkeypatch, tmp_path):
    """Started twice, in the middle interrupted: one id, and every option in its config."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {
        "logger__wandb": True,
        "logger__wandb_offline": True,
        "trainer__max_epochs": 1,
        "evaluate__every_epochs": 0,
    }
    configs = []
    for drill, status in (("preempt@2", 75), (None, 0)):
        monkeypatch.setenv(DRILL, drill) if drill else monkeypatch.delenv(DRILL)
        try:
            assert pretrain(**options).status == status
            configs.append(dict(wandb.run.config))
        finally:
            wandb.finish()
        time.sleep(1.1)  # W&B names its folders by the second
    assert (
        configs[0]["optim"]["lr"] == 5e-3
        and configs[0]["data"]["batch_size"] == 16
        and configs[0]["run"]["output"].endswith("run")
    )
    (name,) = {
        path.parent.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    }
    assert name == (tmp_path / "run" / "wandb_id").read_text().strip()
    logs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 2
    end = time.monotonic() + 30
    while (
        logs[0].stat().st_size < 1000 and time.monotonic() < end
    ):  # W&B's own process writes it, and finish() does not wait for that
        time.sleep(0.1)
    assert logs[0].stat().st_size >= 1000 and len(column(tmp_path / "run", "train/loss")) == 4


def test_tensorboard_has_the_scalars_of_metrics_csv_and_goes_on_after_a_resume(pretrain, monkeypatch, tmp_path):
    """The steps after the last checkpoint are logged twice, and shown once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = {"logger__tensorboard": True, "snapshots__every_epochs": 1}
    batch_end, seen = Keeper.on_train_batch_end, []

    def crash(self, trainer, *rest):
        batch_end(self, trainer, *rest)
        seen.append(trainer.global_step)
        if len(seen) == 6:
            raise RuntimeError("as a crash would")

    monkeypatch.setattr(Keeper, "on_train_batch_end", crash)
    assert pretrain(**options).status == 1
    assert pretrain(**options).status == 0
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    for name in ("train/loss", "train/lr", "knn/top1"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(column(run, name)), name
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8))
    assert {"attention", "attention/epochs"} <= set(events.Tags()["images"])
    assert not (run / "tensorboard" / "hparams.yaml").exists()


def test_tensorboard_that_is_not_installed_is_refused_before_the_run_starts(pretrain, monkeypatch, tmp_path):
    monkeypatch.setattr("vit_suite.training.loggers.find_spec", lambda name: None)
    said = pretrain(logger__tensorboard=True)
    assert said.status == 2 and "pip install 'vit-suite[tensorboard]'" in said.err
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_an_account_is_refused_before_the_run_starts(pretrain, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")

    def login(*_, **__):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", login)
    said = pretrain(logger__wandb=True)
    assert said.status == 2 and "wandb login" in said.err and "--logger.wandb_offline" in said.err
    assert not (tmp_path / "run").exists()
