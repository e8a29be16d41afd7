"""The time of each part of a training step: labels for torch.profiler, and a clock.

Methods contain no code for this. The functions of a step are wrapped on the objects of one training.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from vit_suite.data.module import ImageDataModule
from vit_suite.methods.base import Method

OTHER = "other"
"""The time outside all parts: logging, checks, Lightning's own loop."""
PARTS = ["data", "views", "student forward", "teacher forward", "loss", "backward", "clip", "optimizer", "EMA", OTHER]


class Phases:
    """Labels the parts of a step and, between `start` and `stop`, adds up the seconds of each.

    The time of an inner part does not count for the outer one, so that all parts add up to the time between `start` and
    `stop`. The clock waits for the GPU at every border between parts. Work that usually overlaps is then done in turn.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._running = False
        self._since = 0.0
        self._within = [OTHER]

    def start(self) -> None:
        self.seconds, self._running = dict.fromkeys(PARTS, 0.0), True
        self._since = now(self.device)

    def stop(self) -> None:
        self._charge()
        self._running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time in this context for the part `name`."""
        self._charge()
        self._within.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._charge()
            self._within.pop()

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Count the time in `owner.function` for the part `name`, on this object only."""
        inner = getattr(owner, function)

        @functools.wraps(inner)  # by which Lightning sees whether a module overrides a hook
        def labeled(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, function, labeled)

    def each(self, items: Iterable, name: str) -> Iterator:
        """Iterate over `items`, and count the time of getting the next one for the part `name`."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _charge(self) -> None:
        if self._running:
            moment = now(self.device)
            part = self._within[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + moment - self._since
            self._since = moment


def now(device: torch.device) -> float:
    """The seconds of a clock after `device` has finished all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def label(phases: Phases, method: Method, data: ImageDataModule) -> None:
    """Wrap the functions that a step of `method` on `data` goes through."""
    for function, name in method.timed_functions.items():
        phases.wrap(method, function, name)
    for name, network in method.networks().items():
        for owner, function in entrances(network):
            phases.wrap(owner, function, name)
    wrapped: Any = data
    open_loader = data.train_dataloader

    @functools.wraps(open_loader)
    def labeled_loader() -> Any:
        loader: Any = open_loader()
        produce = loader._produce  # not __iter__, which Python looks up on the class
        loader._produce = lambda epoch, start: phases.each(produce(epoch, start), "data")
        return loader

    wrapped.train_dataloader = labeled_loader


def entrances(network: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """The functions by which others call `network`: the public ones of its class, and `forward` of its backbone and
    heads."""
    yield from (
        (network, name) for name, value in vars(type(network)).items() if callable(value) and not name.startswith("_")
    )
    yield from ((child, "forward") for child in network.children())
