"""kNN against DINO's eval_knn.py."""

from __future__ import annotations

import pytest

from vit_suite.evaluation.knn import KNNOptions, knn_classify

from .golden import largest_error, load_golden, record


@pytest.fixture(scope="module")
def golden():
    return load_golden("knn")


@pytest.fixture(scope="module", params=["default memory", "many chunks"])
def result(request, golden):
    hyperparameters, tensors = golden
    ks = hyperparameters["ks"]
    features = tensors["train_features"], tensors["train_labels"], tensors["test_features"], tensors["test_labels"]
    small = 40 * (96 * max(ks) + 16 * hyperparameters["classes"] + 12 * 256)
    memory = {"memory": small} if request.param == "many chunks" else {}
    return knn_classify(
        *features,
        options=KNNOptions(
            ks=ks,
            temperature=hyperparameters["T"],
            classes=hyperparameters["classes"],
            scores=True,
            neighbours=True,
            **memory,
        ),
    )


def test_knn(golden, result):
    hyperparameters, tensors = golden
    for k in hyperparameters["ks"]:
        name = f"k{k}"
        record(
            "knn", "scores (relative)", largest_error(result.scores[k], tensors[f"{name}.scores"], relative=True), 1e-5
        )
        record("knn", "top-1 %", largest_error([result.top1[k]], tensors[f"{name}.top1"]), 1e-9)
        record("knn", "predictions", largest_error(result.predictions[k], tensors[f"{name}.pred"]), 0)
        lower, upper = float(tensors[f"{name}.top5_lower"]), float(tensors[f"{name}.top5_upper"])
        record("knn", "top-5 % outside [lower, upper]", max(lower - result.top5[k], result.top5[k] - upper, 0.0), 1e-9)
        if f"{name}.nn_idx" in tensors:
            used = tensors[f"{name}.nn_idx"].shape[1]
            record("knn", "neighbours", largest_error(result.neighbours[:, :used], tensors[f"{name}.nn_idx"]), 0)
            record("knn", "similarities", largest_error(result.similarities[:, :used], tensors[f"{name}.nn_sim"]), 1e-6)
