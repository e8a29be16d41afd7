"""torch.compile of the transformer blocks of a training, in place: names of weights, checkpoints and copies stay as
they are.

Blocks alone, because all blocks of a network then share their graphs: one for each size of crop, with and without
gradient. The rest of a step, and all that is scored, drawn or exported between steps, runs as it is; so does the last
block where it answers for the CLS token alone. Drop path gets its numbers from outside, so they are those of a training
that is not compiled.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vit_suite.config import TrainerConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone


def check_compile(options: TrainerConfig, device: torch.device) -> None:
    """UserError where `trainer.compile` cannot be, on this device or with the other options."""
    how = options.compile
    if how == "none":
        return
    if options.strategy == "fsdp2":
        raise UserError(
            f"trainer.compile {how} makes one graph of a block, and trainer.strategy fsdp2 gathers the parts of a block"
            " while it runs: leave one out."
        )
    if how == "graphs" and device.type != "cuda":
        raise UserError(
            "trainer.compile graphs captures CUDA graphs, and this training is on a CPU: use blocks, or none."
        )
    if how == "graphs" and options.accumulate > 1:
        raise UserError(
            "trainer.compile graphs writes gradients where the next micro-batch would overwrite them: use blocks with"
            " trainer.accumulate."
        )
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    names = (
        [cxx] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    )  # as torch's and Triton's code generators look
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"trainer.compile {how} needs a compiler, and there is no {' or '.join(names)} here: install one, or use"
            " none."
        )


def compile_blocks(method: nn.Module, graphs: bool = False) -> None:
    """Compile every block of every backbone within `method` for its training; the first steps take long.

    graphs: record each graph's kernels as a CUDA graph, so that a GPU need not wait for the host to launch them.
    """
    for part in method.modules():
        if isinstance(part, Backbone):
            for block in part.vit.blocks:
                block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
                # The attribute that `compile` sets, and which copies of a module leave behind.
                block._compiled_call_impl = functools.partial(_while_training, block, block._compiled_call_impl)


def _while_training(block: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Scores come in batches of other sizes, with graphs of their own: more than torch keeps."""
    return (compiled if block.training else block._call_impl)(*args, **kwargs)


class MarkSteps(pl.Callback):
    """Tells recorded graphs where a step begins: their results of the one before may then be overwritten."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
