"""`vit-suite localize`: what a backbone finds, beside its untrained self, a centered box and the whole image."""

from __future__ import annotations

import logging
from dataclasses import asdict

from vit_suite import distributed
from vit_suite.attention.localize import Localizer, open_scored
from vit_suite.attention.localized import localize
from vit_suite.config import LocalizeConfig
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import UserError
from vit_suite.hardware import pick_precision, rank_device
from vit_suite.logs import speak
from vit_suite.reports.results import append_result, results_path
from vit_suite.reports.scores import localization_report
from vit_suite.weights.checkpoint import load_backbone

log = logging.getLogger("vit_suite")


def run(cfg: LocalizeConfig) -> None:
    """Score `cfg.checkpoint` against truth, on one rank or many."""
    speak()
    with distributed.launched():
        loaded = load_backbone(cfg.checkpoint, cfg)
        if "attention" in cfg.method and not loaded.backbone.has_cls:
            raise UserError(
                f"'{cfg.checkpoint}' has no CLS token, so no attention to score: use --method lost tokencut, which need"
                " none."
            )
        path = results_path(cfg)
        source, truths = open_scored(cfg, loaded.backbone.cfg.channels)
        device = rank_device(cfg.accelerator)
        localizer = Localizer(
            source,
            truths,
            list(dict.fromkeys(cfg.method)),
            sorted(set(cfg.threshold)),
            None if cfg.image_size == "own" else cfg.image_size,
            cfg.max_tokens,
            cfg.batch_size,
            device,
            pick_precision(cfg.precision, device),
            progress=True,
        )
        check = Quarantine(limit=cfg.data.max_corrupt)
        total = len(source) + len(source.failures)
        check.report(list(source.failures), source.title, total)
        found = localize(localizer, {"checkpoint": loaded, "untrained": loaded.untrained(cfg.seed)}, cfg.seed)
        check.report(found.looked.failures, source.title, total)
        if distributed.rank() == 0:
            if failures := [*source.failures, *found.looked.failures]:
                log.warning("%d images or truths cannot be used, first %s", len(failures), failures[0])
            print(localization_report(found))
            protocol = found.protocol() | {
                "checkpoint": cfg.checkpoint,
                "trained_on": loaded.meta,
                "options": asdict(cfg),
            }
            append_result(path, "localize", found.metrics(), protocol, loaded.sha256)
            print(f"appended to {path}")
