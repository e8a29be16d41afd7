"""`vit-suite pretrain --drill preempt@37,kill@50`: what a cluster does to a training, done to it here.

The command starts itself as a child process, which sends itself the signal in the step named, and starts it again until
it is done. So the training under test is the ordinary command, with nothing of the drill in it but that signal.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from vit_suite.config import PretrainConfig
from vit_suite.errors import UserError, unknown_name
from vit_suite.parsing import dump_config
from vit_suite.signals import STATUS, WARNING
from vit_suite.training import rundir
from vit_suite.training.stop import DRILL

log = logging.getLogger("vit_suite")

SIGNALS: dict[str, int | None] = {"preempt": WARNING, "kill": getattr(signal, "SIGKILL", None)}
"""Kind of event -> the signal that does it; None on Windows, which has neither."""


class Event(NamedTuple):
    """What happens in optimizer step `step`, counted from 1."""

    kind: str
    step: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}"


def parse(text: str) -> list[Event]:
    """`preempt@37,kill@50` in the order of the steps. UserError for anything else."""
    events = []
    for word in text.split(","):
        kind, _, step = word.strip().partition("@")
        if kind not in SIGNALS:
            raise unknown_name("kind of drill", kind, SIGNALS)
        if SIGNALS[kind] is None:
            raise UserError(f"drill '{word.strip()}': this system has no signal for it.")
        if not step.isascii() or not step.isdigit() or int(step) < 1:
            raise UserError(f"drill '{word.strip()}': expected {kind}@STEP with a step from 1.")
        events.append(Event(kind, int(step)))
    events.sort(key=lambda event: event.step)
    for first, second in pairwise(events):
        if first.step == second.step:
            raise UserError(f"drill '{first},{second}': one event a step; a step that is done is not done again.")
    return events


# In the training
# ------------------------------------------------------------------------------------------------------------------


class Drill(pl.Callback):
    """Sends this process the signal of an event in the middle of its step: after the gradients, before the weights
    change.

    SIGUSR1 goes to the last rank alone, as signals reach ranks at different moments; SIGKILL to all.
    """

    def __init__(self, event: Event):
        self.event = event

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.event.step and (
            self.event.kind == "kill" or trainer.global_rank == trainer.world_size - 1
        ):
            if (number := SIGNALS[self.event.kind]) is not None:
                os.kill(os.getpid(), number)


def drill_callbacks(done: int, last: int) -> list[Drill]:
    """The event that a drill wants of this training, of `last` steps with `done` behind it. UserError when it cannot
    take place."""
    if DRILL not in os.environ:
        return []
    (event,) = parse(os.environ[DRILL])
    if not done < event.step <= last:
        behind = f" and {done} of them are done" if done else ""
        raise UserError(f"drill {event}: the training has {last} steps{behind}; name a step from {done + 1} to {last}.")
    return [Drill(event)]


# Around it
# ----------------------------------------------------------------------------------------------------------------------


def run_drill(cfg: PretrainConfig) -> int:
    """Run the training of `cfg` through its events to its end; returns its exit status, not 0 when it went otherwise
    than planned."""
    events = parse(cfg.drill or "")
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("--drill starts its own processes: run it without torchrun or srun.")
    folder, repeated = Path(cfg.run.output), 0
    plain = replace(cfg, drill=None)
    with tempfile.TemporaryDirectory(prefix="vit-suite-drill-") as scratch:
        for event in [*events, None]:
            status = _start(plain, Path(scratch), event)
            if event is None or status != _expected(event):
                break
            plain = replace(plain, run=replace(plain.run, overwrite=False))
            repeated += _say(event, folder)
    if status == 0 and event is None:
        weights = json.loads((folder / "backbone.json").read_text())["sha256"]
        log.info(
            "drill %s: finished, %d steps done twice; sha256 of the weights %s",
            ",".join(map(str, events)),
            repeated,
            weights,
        )
        log.info("The same command without --drill, in another run directory, ends with the same weights.")
    return status


def _expected(event: Event) -> int:
    number = SIGNALS[event.kind]
    assert number is not None  # `parse` saw to it
    return STATUS[number] if event.kind == "preempt" else -number


def _start(cfg: PretrainConfig, scratch: Path, event: Event | None) -> int:
    """Train as a user would, in a process of its own that gets the signals this one gets."""
    path = scratch / "config.yaml"
    path.write_text(dump_config(cfg))
    environment = {key: value for key, value in os.environ.items() if key != DRILL}
    if event:
        environment[DRILL] = str(event)
    child = subprocess.Popen([sys.executable, "-m", "vit_suite", "pretrain", "--config", str(path)], env=environment)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in STATUS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(event: Event, folder: Path) -> int:
    """Tell where the training goes on; returns how many steps it does again."""
    last = folder / "checkpoints" / "last.ckpt"
    saved = rundir.steps_done(last) if last.is_file() else 0
    finished = event.step if event.kind == "preempt" else event.step - 1
    log.info("drill %s: %d steps were done, %d are in the checkpoint; starting again", event, finished, saved)
    return finished - saved
