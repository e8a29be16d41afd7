"""`vit-suite pretrain`: train a backbone, and say what to do next."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import quote

from vit_suite.config import PretrainConfig
from vit_suite.logs import speak
from vit_suite.training.drill import run_drill
from vit_suite.training.run import train
from vit_suite.weights import head

log = logging.getLogger("vit_suite")


def run(cfg: PretrainConfig) -> None:
    """Train, or resume, the run of `cfg`; with --drill, interrupt it on the way."""
    speak()
    if cfg.drill:
        if status := run_drill(cfg):
            raise SystemExit(status)
        return
    say_next(cfg, train(cfg))


def say_next(cfg: PretrainConfig, folder: Path | None) -> None:
    """Log what one may do with the run in `folder`; None on the ranks that say nothing."""
    for command in next_commands(cfg, folder) if folder else []:
        log.info("next: vit-suite %s", command)


def next_commands(cfg: PretrainConfig, folder: Path) -> list[str]:
    """What one may do with a trained run: look at its maps and features, score it where there are labels, and name the
    classes of new images where it has a head.

    A `flat` tree has none, so its kNN names a folder that the reader fills in.
    """
    run, root = quote(str(folder)), cfg.data.root
    options = f"--data.name {cfg.data.name}" + (f" --data.root {quote(root)}" if root else "")
    if cfg.data.name != "flat":
        held_out = f" --data.holdout {cfg.data.holdout:g}" if cfg.data.holdout else ""
        named = [f"predict --checkpoint {run} --images IMAGES --output {run}/labels.csv"]
        return [
            *(named if (folder / head.NAME).is_file() else []),
            f"knn --checkpoint {run} {options}{held_out} --baselines",
            f"attention --checkpoint {run} --images IMAGES --output {run}/attention --gallery",
        ]
    return [
        f"attention --checkpoint {run} {options} --output {run}/attention --gallery",
        f"embed --checkpoint {run} {options} --output {run}/features.npz",
        f"knn --checkpoint {run} --data.name folder --data.root CLASSES --data.holdout 0.2"
        " --baselines  # with labels: CLASSES/NAME/*.jpg",
    ]
