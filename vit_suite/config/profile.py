"""`vit-suite profile`: how long to look, and where the trace goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vit_suite.config.limits import Count, OutputFolder, Range
from vit_suite.config.pretrain import PretrainConfig


@dataclass
class ProfileConfig(PretrainConfig):
    """Run some steps of a training and say where their time goes. The options of `pretrain` mean what they mean there,
    so its config can be given as it is; nothing is scored, logged or kept, and run.output is not touched. One process
    on one device, which takes the whole of data.batch_size."""

    output: OutputFolder = "profile"
    """Folder of trace.json (chrome://tracing and ui.perfetto.dev show it) and profile.json (the figures); both are
    written anew."""
    steps: Annotated[int, Range(1, ceiling=1_000_000)] = 10
    """Optimizer steps that are timed; as many again are timed part by part, and the first three of further ones
    traced."""
    warmup: Annotated[int, Range(1, ceiling=1_000_000)] = 3
    """Optimizer steps before that."""
    operators: Count = 15
    """Operators shown, those with most time of their own first."""
