"""torch.compile of the transformer blocks of a training, in place. Names of weights, checkpoints and copies do not
change.

Only blocks are compiled, because all blocks of a network can share their graphs: one for each size of crop, with and
without gradient. The rest of a step is not compiled, nor is the last block where it computes only the CLS token.
Scores, pictures and exports between steps use the blocks without compilation. Drop path gets its random numbers as an
input, so they are the same with and without compilation.
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
    """UserError where `trainer.compile` is impossible on this device or with the other options."""
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
    # The names that torch's code generator (CPU) and Triton (GPU) look for.
    names = [cxx] if device.type == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"trainer.compile {how} needs a compiler, and there is no {' or '.join(names)} here: install one, or use"
            " none."
        )


def compile_blocks(method: nn.Module, graphs: bool = False) -> None:
    """Compile every block of every backbone of `method` for its training. The first steps then take long.

    With `graphs` the kernels of each graph are recorded as a CUDA graph, so that the GPU does not wait for the host to
    launch them one by one.
    """
    for part in method.modules():
        if isinstance(part, Backbone):
            for block in part.vit.blocks:
                block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
                # `compile` sets this attribute, and copies of a module do not have it.
                block._compiled_call_impl = functools.partial(_while_training, block, block._compiled_call_impl)


def _while_training(block: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Use the compiled block in training alone: batches of scores have other sizes, and torch keeps few graphs."""
    return (compiled if block.training else block._call_impl)(*args, **kwargs)


class MarkSteps(pl.Callback):
    """Tells CUDA graphs where a step begins, because they may then overwrite the results of the step before."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()
