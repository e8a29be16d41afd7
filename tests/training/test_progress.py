"""The progress bar of a GPU shows the loss, and reads it only when it is drawn."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from vit_suite.training.progress import PatientBar


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
