"""What the keeper refuses; when it writes is in tests/commands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vit_suite.config import CheckpointConfig
from vit_suite.weights.keeper import Keeper


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_text("good")
    network = torch.nn.Linear(2, 2)
    with torch.no_grad():
        network.bias[1] = float("nan")
    with pytest.raises(RuntimeError, match="not finite at step 7; last.ckpt stays as it was"):
        Keeper(tmp_path, CheckpointConfig()).save(SimpleNamespace(lightning_module=network, global_step=7), "last")
    assert last.read_text() == "good" and list(last.parent.iterdir()) == [last]
