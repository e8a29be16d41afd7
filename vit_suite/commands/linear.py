"""`vit-suite linear`: heads on a frozen backbone, chosen on held-out training images; tables on the screen, all of it
in results.json."""

from __future__ import annotations

import logging
from dataclasses import asdict

from vit_suite import distributed
from vit_suite.config import LinearConfig
from vit_suite.errors import UserError
from vit_suite.evaluation.linear_protocols import resolve
from vit_suite.evaluation.prober import Prober, as_metrics
from vit_suite.evaluation.scored import open_scored, view_size
from vit_suite.logs import speak
from vit_suite.reports.results import append_result, results_path
from vit_suite.reports.scores import left_out, linear_report
from vit_suite.weights.checkpoint import load_backbone

log = logging.getLogger("vit_suite")


def run(cfg: LinearConfig) -> None:
    """Probe `cfg.checkpoint`, beside its untrained self and raw pixels with `baselines`; on one rank or many."""
    speak()
    with distributed.launched():
        loaded = load_backbone(cfg.checkpoint, cfg)
        size, path = view_size(cfg, loaded), results_path(cfg)
        protocol, features = resolve(cfg, loaded.backbone)
        if protocol.augment and size[0] != size[1]:
            raise UserError(
                f"augment: random crops are square, and the view is {size[0]}x{size[1]}; give --image_size or --augment"
                " false."
            )
        data = open_scored(cfg, loaded, "linear evaluation")
        prober = Prober(cfg, data, size, protocol)
        results = {"checkpoint": prober.backbone(loaded, features)}
        if cfg.baselines:
            baselines = {
                "untrained": lambda: prober.backbone(loaded.untrained(cfg.seed), features),
                "raw pixels": prober.pixels,
            }
            for name, baseline in baselines.items():
                try:
                    results[name] = baseline()
                except UserError as error:  # what does not fit or diverges here must not cost the checkpoint its score
                    if prober.speaks:
                        log.warning("%s left out: %s", name, error)
        if prober.speaks:
            print(linear_report(results, prober))
            images = data.usable(data.test())
            metrics = {name: as_metrics(result, images) for name, result in results.items()}
            metrics["chance"] = prober.chance().as_dict()
            entry = prober.describe() | {
                "checkpoint": cfg.checkpoint,
                "trained_on": loaded.meta,
                "data_options": asdict(data.cfg),
            }
            if missing := left_out(entry["left_out"]):
                print(missing)
            append_result(path, "linear few-shot" if cfg.shots else "linear", metrics, entry, loaded.sha256)
            print(f"appended to {path}")
