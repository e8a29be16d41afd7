"""`vit-suite pretrain`: train a backbone, and say what to do next."""

from __future__ import annotations

import logging

from vit_suite.config import PretrainConfig
from vit_suite.logs import speak
from vit_suite.training.drill import run_drill
from vit_suite.training.run import train

log = logging.getLogger("vit_suite")


def run(cfg: PretrainConfig) -> None:
    """Train, or resume, the run of `cfg`; with --drill, interrupt it on the way."""
    speak()
    if cfg.drill:
        if status := run_drill(cfg):
            raise SystemExit(status)
        return
    folder = train(cfg)
    if folder is None:
        return
    root = f" --data.root {cfg.data.root}" if cfg.data.root else ""
    log.info("next: vit-suite knn --checkpoint %s --data.name %s%s --baselines", folder, cfg.data.name, root)
    log.info("      vit-suite attention --checkpoint %s --images IMAGES --output %s/attention", folder, folder)
