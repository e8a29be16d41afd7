"""The linear head of a supervised run beside its backbone: `head.safetensors` in the run directory."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vit_suite.errors import UserError
from vit_suite.files import write_atomically

NAME = "head.safetensors"


def save_head(head: nn.Linear, classes: list[str], folder: str | Path, backbone_sha256: str) -> None:
    """Write `head.safetensors` into `folder`: weight (K, D), bias (K,), the names of the K classes, and the sha256 of
    the backbone that the head was trained on."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    description = json.dumps({"classes": classes, "backbone_sha256": backbone_sha256})
    write_atomically(Path(folder) / NAME, lambda path: save_file(state, path, metadata={"vit_suite": description}))


def load_head(folder: str | Path) -> tuple[nn.Linear, list[str], str]:
    """(head, names of its classes, sha256 of its backbone) from a run directory. UserError when there is none or it is
    damaged."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise UserError(f"'{folder}' holds no {NAME}: it is no supervised or fine-tuning run.")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["vit_suite"])
            state = {name: file.get_tensor(name) for name in ("weight", "bias")}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is truncated or no head of a run ({error}).") from error
    head = nn.Linear(*reversed(state["weight"].shape))
    head.load_state_dict(state)
    return head.eval(), description["classes"], description["backbone_sha256"]
