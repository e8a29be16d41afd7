"""What a training says while it runs: a bar on a terminal, lines elsewhere, and whether it waits for its images."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.commands.conftest import words
from vit_suite.training.progress import Length, PatientBar, Progress
from vit_suite.training.status import read_status


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: list, number: int) -> torch.Tensor:
        self.log("train/loss", torch.tensor(float(number)))
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_bar_reads_the_loss_when_it_is_drawn(tmp_path, monkeypatch):
    read, get_metrics = [], PatientBar.get_metrics
    monkeypatch.setattr(PatientBar, "get_metrics", lambda *args: read.append(get_metrics(*args)) or read[-1])
    bar, options = (
        PatientBar(refresh_rate=4),
        {"logger": False, "enable_checkpointing": False, "enable_model_summary": False},
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[bar], default_root_dir=tmp_path, **options
    )
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(8, 1))))
    assert [shown["train/loss"] for shown in read] == [3, 7, 7]  # the last of them when the epoch ends
    assert "train/loss=7" in bar.train_progress_bar.postfix


# Without a terminal
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the loader and the model below move, by `wait(seconds)`: a busy machine changes nothing."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def wait(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr("vit_suite.training.progress.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Slow(torch.utils.data.Dataset):
    """Twelve images that take `seconds` each to load."""

    def __init__(self, clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.clock.wait(self.seconds)
        return (torch.ones(1),)


class Step(Line):
    """A step that takes `seconds`."""

    def __init__(self, clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def training_step(self, batch: list, number: int) -> torch.Tensor:
        self.clock.wait(self.seconds)
        return super().training_step(batch, number)


def watched(folder, module, dataset, **options) -> Progress:
    """A training that `Progress` follows, with status.json written after every step."""
    progress = Progress(folder, Length(1, 12, 12), **options)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=[progress],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        profiler=progress.clock,
    )
    trainer.fit(module, DataLoader(dataset))
    return progress


@pytest.mark.parametrize(("load", "step", "warned"), [(0.15, 0.05, True), (0.05, 0.15, False)])
def test_the_share_of_waiting_tells_a_slow_loader_from_a_slow_model(
    tmp_path, monkeypatch, caplog, clock, load, step, warned
):
    monkeypatch.setattr("vit_suite.training.progress.EVERY", 0.0)
    monkeypatch.setattr("vit_suite.training.progress.PATIENCE", 0.2)
    watched(tmp_path, Step(clock, step), Slow(clock, load))
    status = read_status(tmp_path)
    assert status.waiting == pytest.approx(load / (load + step), abs=0.05) and status.step == 12
    said = [record.getMessage() for record in caplog.records if "waiting for images" in record.getMessage()]
    assert len(said) == warned
    assert not warned or "the loader is slower than the model" in said[0]


def test_lines_in_the_log(tmp_path, monkeypatch, caplog, clock):
    monkeypatch.setattr("vit_suite.training.progress.EVERY", 0.0)
    with caplog.at_level(logging.INFO, "vit_suite"):
        watched(tmp_path, Step(clock, 0.0625), Slow(clock, 0.0), line_every=0.25)
    lines = [record.getMessage() for record in caplog.records if " of 12" in record.getMessage()]
    assert [re.search(r"step (\d+) of", line)[1] for line in lines] == ["4", "8", "12"]
    assert re.fullmatch(r"epoch 1, step \d+ of 12, 16 images/s, .*left", lines[0]), lines


def test_no_lines_without_line_every(tmp_path, caplog, clock):
    with caplog.at_level(logging.INFO, "vit_suite"):
        watched(tmp_path, Step(clock, 1.0), Slow(clock, 0.0))
    assert not [record for record in caplog.records if " of 12" in record.getMessage()]


def test_a_command_without_a_terminal_writes_lines_and_no_bar(vit_suite, tmp_path, monkeypatch, clock):
    monkeypatch.setattr("vit_suite.training.progress.EVERY", 0.0)
    monkeypatch.setattr(Progress, "on_train_batch_start", lambda *args: clock.wait(1.0))
    options = {"run__output": tmp_path / "run", "trainer__max_epochs": 1, "evaluate__every_epochs": 0}
    said = vit_suite("pretrain", *words(trainer__progress=True, trainer__line_every=0.1, **options))
    assert said.status == 0 and re.findall(r"step (\d) of 4,.* loss \d.*, KL \d", said.log) == ["1", "2", "3", "4"]
    assert "it/s" not in said.out + said.err
    options["run__output"] = tmp_path / "quiet"
    assert not re.search(r"step \d of 4,", vit_suite("pretrain", *words(trainer__progress=False, **options)).log)


def test_the_failure_of_a_rank_stays(tmp_path):
    """Rank 0 goes on for a moment, or the launcher ends it; a later start writes over it."""
    progress = Progress(tmp_path, Length(1, 12, 12))
    progress.write("running")
    Progress(tmp_path, Length(1, 12, 12)).write("failed", "OSError: broken (rank 1)")
    for state in ("running", "stopped"):
        progress.write(state, "SIGTERM")
        assert read_status(tmp_path).reason == "OSError: broken (rank 1)"
    Progress(tmp_path, Length(1, 12, 12)).write("running")
    assert read_status(tmp_path).state == "running"
