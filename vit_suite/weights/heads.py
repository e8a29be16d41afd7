"""The projection heads of DINO and DINOv2 in a full training checkpoint, for a training that continues with them.

`main_dino.py` writes `student` (`module.head.mlp.0.weight`) and `teacher` (`head.mlp.0.weight`); this suite's `.ckpt`
has the same names under `state_dict` (`student.head.mlp.0.weight`).
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from vit_suite.errors import UserError
from vit_suite.weights.reading import checked, read_content


def checkpoint_file(checkpoint: str) -> Path:
    """The file that may hold heads: a run directory's last.ckpt, or the file itself."""
    path = Path(checkpoint)
    return path / "checkpoints" / "last.ckpt" if path.is_dir() else path


def take_heads(method: nn.Module, checkpoint: str) -> int:
    """Give every head of `method` (modules named `student.*head` and `teacher.*head`) the weights of the teacher's in
    `checkpoint`; returns how many. Student and teacher start equal, as their backbones do.

    Raises:
        UserError: the method has no such heads, or the checkpoint does not hold one, or of another shape.
    """
    path = checkpoint_file(checkpoint)
    heads = {name: part for name, part in method.named_modules() if re.fullmatch(r"(student|teacher)\.\w*head", name)}
    if not heads:
        raise UserError("start_heads is for methods with a student's and a teacher's head, such as dino.")
    if not path.is_file():
        raise UserError(f"start_heads: '{checkpoint}' holds no training checkpoint, only a backbone: leave it out.")
    tensors = checked(read_content(path, checkpoint).tensors, checkpoint)
    for name, head in heads.items():
        rest = name.partition(".")[2]
        prefix = re.compile(rf"^(state_dict\.)?teacher\.(module\.)?{re.escape(rest)}\.")
        found = {prefix.sub("", key): tensor for key, tensor in tensors.items() if prefix.match(key)}
        own = head.state_dict()
        if not found:
            raise UserError(
                f"start_heads: '{checkpoint}' holds no 'teacher.{rest}': leave start_heads out for a fresh one."
            )
        for key, tensor in own.items():
            if key not in found or found[key].shape != tensor.shape:
                shape = tuple(found[key].shape) if key in found else "missing"
                raise UserError(
                    f"start_heads: 'teacher.{rest}.{key}' is {shape} in '{checkpoint}', and {tuple(tensor.shape)} here:"
                    " give the head's options of that training, or leave start_heads out."
                )
        head.load_state_dict({key: found[key] for key in own})
    return len(heads)
