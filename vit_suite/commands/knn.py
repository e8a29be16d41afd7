"""`vit-suite knn`: weighted kNN of a frozen backbone, a table on the screen and an entry in results.json."""

from __future__ import annotations

import logging
from dataclasses import asdict

from vit_suite import distributed
from vit_suite.config import KNNConfig
from vit_suite.data.resident import GIB
from vit_suite.errors import counted
from vit_suite.evaluation.interval import bank_remarks, chance
from vit_suite.evaluation.knn_scorer import Scorer, accuracies, shots_metrics
from vit_suite.evaluation.scored import open_scored, view_size
from vit_suite.hardware import rank_device
from vit_suite.logs import speak
from vit_suite.reports.results import append_result, results_path
from vit_suite.reports.scores import accuracy_table, left_out, shots_table
from vit_suite.weights.checkpoint import load_backbone

log = logging.getLogger("vit_suite")


def run(cfg: KNNConfig) -> None:
    """Score `cfg.checkpoint`, beside its untrained self and raw pixels with `baselines`; on one rank or many."""
    speak()
    with distributed.launched():
        loaded = load_backbone(cfg.checkpoint, cfg)
        size, path = view_size(cfg, loaded), results_path(cfg)
        data = open_scored(cfg, loaded, "kNN")
        scorer = Scorer(data, cfg.k, cfg.temperature, size, cfg.batch_size, rank_device(cfg.accelerator), cfg.precision)
        features = {"checkpoint": scorer.features(loaded)}
        if cfg.baselines:
            features["untrained"] = scorer.features(loaded.untrained(cfg.seed))
            need = 4 * data.cfg.channels * size[0] * size[1] * (len(scorer.bank) + len(scorer.test)) / GIB
            if need <= cfg.data.memory_gb:
                features["raw pixels"] = scorer.pixel_features()
            else:
                log.info(
                    "raw pixels are left out: they take %.1f GiB, and data.memory_gb is %g", need, cfg.data.memory_gb
                )
        protocol = scorer.protocol() | {
            "checkpoint": cfg.checkpoint,
            "trained_on": loaded.meta,
            "data_options": asdict(data.cfg),
        }
        if cfg.shots:
            few = {name: scorer.few_shot(found, cfg.shots, cfg.draws, cfg.seed) for name, found in features.items()}
            shown, metrics = shots_table(few), {name: shots_metrics(shots) for name, shots in few.items()}
            protocol |= {"shots": cfg.shots, "draws": cfg.draws, "seed": cfg.seed}
            protocol["spread"] = "mean and sample standard deviation over draws"
        else:
            results = {name: scorer.vote(*found) for name, found in features.items()}
            shown, metrics = accuracy_table(results), {name: accuracies(result) for name, result in results.items()}
        bank_labels, labels = (found.labels for found in features["checkpoint"])
        guessing = chance(labels, scorer.classes)
        metrics["chance"] = guessing.as_dict()
        if distributed.rank() == 0:
            bank = f"bank of {data.usable(scorer.bank)}" + (f": {cfg.draws} draws from each class" if cfg.shots else "")
            count = data.usable(scorer.test)
            print(f"{data.name}: top-1 % of {counted(count, 'image')}, {bank}, temperature {cfg.temperature}\n{shown}")
            print(guessing)
            for remark in [] if cfg.shots else bank_remarks(cfg.k, bank_labels):
                log.warning("%s", remark)
            if missing := left_out(protocol["left_out"]):
                print(missing)
            append_result(path, "knn few-shot" if cfg.shots else "knn", metrics, protocol, loaded.sha256)
            print(f"appended to {path}")
