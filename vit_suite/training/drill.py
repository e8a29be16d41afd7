"""`vit-suite pretrain --drill preempt@37,kill@50`: a rehearsal of what a cluster does to a training.

The command starts itself as a child process. The child sends itself the signal in the named step, and the parent starts
it again until the training is done. So the training under test is the ordinary command; only the signal is added.
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
from vit_suite.errors import UserError, counted, unknown_name
from vit_suite.parsing import dump_config
from vit_suite.signals import STATUS, WARNING
from vit_suite.training import rundir
from vit_suite.training.stop import DRILL

log = logging.getLogger("vit_suite")

SIGNALS: dict[str, int | None] = {"preempt": WARNING, "kill": getattr(signal, "SIGKILL", None)}
"""Kind of event -> its signal; None on Windows, which has neither signal."""


class Event(NamedTuple):
    """An interruption in optimizer step `step`, counted from 1."""

    kind: str
    step: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}"


def parse(text: str) -> list[Event]:
    """The events of `preempt@37,kill@50`, in the order of their steps. UserError for any other text."""
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


# Inside the training.


class Drill(pl.Callback):
    """Sends this process the signal of an event in the middle of its step: after the gradients are there, before the
    weights change.

    Only the last rank gets SIGUSR1, because on a cluster signals reach ranks at different moments. All ranks get
    SIGKILL.
    """

    def __init__(self, event: Event):
        self.event = event

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        hit = self.event.kind == "kill" or trainer.global_rank == trainer.world_size - 1
        number = SIGNALS[self.event.kind]
        if hit and number is not None and trainer.global_step + 1 == self.event.step:
            os.kill(os.getpid(), number)


def drill_callbacks(done: int, last: int) -> list[Drill]:
    """The callback for the event that the drill asks of this training; none without a drill.

    Args:
        done: optimizer steps done before.
        last: optimizer steps of the whole training.

    Raises:
        UserError: the training does not reach the step of the event, or is beyond it.
    """
    if DRILL not in os.environ:
        return []
    (event,) = parse(os.environ[DRILL])
    if not done < event.step <= last:
        behind = f" and {done} of them are done" if done else ""
        raise UserError(
            f"drill {event}: the training has {counted(last, 'step')}{behind}; name a step from {done + 1} to {last}."
        )
    return [Drill(event)]


# Around the training.


def run_drill(cfg: PretrainConfig) -> int:
    """Run the training of `cfg` through all events to its end. Returns its exit status, which is not 0 if something
    unplanned happened."""
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
    """Train in a child process, as a user would. Signals to this process are passed on to the child."""
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
    """Log where the training goes on. Returns the number of steps that it has to repeat."""
    last = folder / "checkpoints" / "last.ckpt"
    saved = rundir.steps_done(last) if last.is_file() else 0
    finished = event.step if event.kind == "preempt" else event.step - 1
    log.info("drill %s: %d steps were done, %d are in the checkpoint; starting again", event, finished, saved)
    return finished - saved
