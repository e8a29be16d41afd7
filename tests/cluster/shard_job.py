"""What two ranks do twice, with whole weights on each (ddp) and with weights spread over them (fsdp2).

`python -m torch.distributed.run ... -m tests.cluster.shard_job FOLDER` leaves FOLDER/ddp/NAME and FOLDER/fsdp2/NAME,
run directories, and in each `held_RANK.pt`: how many numbers that rank held at the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from tests.cluster.rank_job import METHODS, TRAINING
from vit_suite import cli, distributed
from vit_suite.training import run as training
from vit_suite.training.stop import DRILL

SUPERVISED = ["--method.name=supervised", "--optim.layer_decay=0.7"]
RUNS = {
    "dino": [*METHODS["dino"], "--method.freeze_last_layer_epochs=1", "--optim.clip=0.3", "--snapshots.every_epochs=1"],
    "sit": [*METHODS["sit_v3"], "--method.loss_weights=july", "--method.sheet_every_epochs=1", "--optim.clip=0.3",
            "--optim.clip_mode=global"],
    "dinov2": [*METHODS["dinov2"], "--optim.clip=0.3", "--method.freeze_last_layer_epochs=1"],
    "crossmae": [*METHODS["crossmae"], "--optim.clip=0.3", "--optim.clip_mode=global"],
    "supervised": [*SUPERVISED, "--trainer.accumulate=2", "--backbone.checkpointing=true"],
    "bf16": [*METHODS["dino"], "--trainer.precision=bf16"],
}  # fmt: skip
STOPS = {2: "fsdp2", 6: "fsdp2", None: "ddp"}
"""The sharded DINO run is stopped after step 2, while the last layer is frozen, and after 6, and ends with whole
weights."""


class Held(pl.Callback):
    """Counts what a rank holds of parameters and of AdamW's two moments."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        parameters = sum(distributed.own_part(parameter).numel() for parameter in module.parameters())
        entries = trainer.optimizers[0].state.values()
        moments = sum(
            distributed.own_part(entry[name]).numel() for entry in entries for name in ("exp_avg", "exp_avg_sq")
        )
        torch.save([parameters, moments], Path(trainer.default_root_dir) / f"held_{distributed.rank()}.pt")


def train(folder: Path, name: str, strategy: str, stop: int | None = None) -> None:
    """One start of a run."""
    command = [
        *TRAINING,
        *RUNS[name],
        f"--run.output={folder / name}",
        f"--trainer.strategy={strategy}",
        "--trainer.devices=2",
    ]
    os.environ.pop(DRILL, None)
    if stop:
        os.environ[DRILL] = f"preempt@{stop}"
    expected = 75 if stop and distributed.rank() == 0 else 0
    assert cli.main(["pretrain", *command]) == expected, (name, strategy, stop)


def run(folder: Path) -> None:
    """Everything, into FOLDER."""
    callbacks = training.build_callbacks
    training.build_callbacks = lambda *arguments: [Held(), *callbacks(*arguments)]
    for strategy in ("ddp", "fsdp2"):
        for name in RUNS:
            train(folder / strategy, name, strategy)
    for stop, strategy in STOPS.items():
        train(folder / "resumed", "dino", strategy, stop)


if __name__ == "__main__":
    with distributed.launched():
        run(Path(sys.argv[1]))
