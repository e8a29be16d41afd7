"""Schedules, clipping and parameter groups against DINO's utils.py."""

from __future__ import annotations

import pytest

from vit_suite.config import DINOConfig
from vit_suite.methods.dino import Network
from vit_suite.optim.groups import clip_each, parameter_groups
from vit_suite.optim.schedules import cosine

from .golden import largest_error, load_golden, load_golden_json, record
from .networks import golden_backbone_config


def test_schedules():
    hyper, tensors = load_golden("schedules")
    for name, options in hyper["s"].items():
        per_epoch = options["niter_per_ep"]
        steps = options["epochs"] * per_epoch
        warmup = options.get("warmup_epochs", 0) * per_epoch
        ours = [
            cosine(
                step,
                steps,
                options["base_value"],
                options["final_value"],
                warmup,
                options.get("start_warmup_value", 0.0),
            )
            for step in range(steps)
        ]
        record("schedules", name, largest_error(ours, tensors[name], relative=True), 1e-15)


def test_clip_each():
    hyper, tensors = load_golden("clip_gradients")
    gradients = [tensors[f"grad_in_{index}"].clone() for index in range(len(hyper["shapes"]))]
    norms = clip_each(gradients, hyper["clip"])
    record(
        "clip_gradients",
        "norms (relative)",
        largest_error([float(n) for n in norms], tensors["norms"], relative=True),
        1e-6,
    )
    for index, gradient in enumerate(gradients):
        record(
            "clip_gradients",
            "gradients (relative)",
            largest_error(gradient, tensors[f"grad_out_{index}"], relative=True),
            1e-6,
        )


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_parameter_groups(norm_last_layer):
    golden = load_golden_json("param_groups")
    hyper = golden["hyperparameters"]
    expected = golden["groups"][f"norm_last_layer_{str(norm_last_layer).lower()}"]
    method = DINOConfig(out_dim=hyper["out_dim"], hidden_dim=hyper["hidden"], bottleneck_dim=hyper["bottleneck"])
    student = Network(golden_backbone_config(hyper), method, norm_last_layer)
    names = {id(p): name.replace("backbone.vit.", "backbone.") for name, p in student.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(student))
    assert sorted(decayed) == sorted(expected["regularized"])
    assert sorted(plain) == sorted(expected["not_regularized"])
    assert sorted(set(names.values()) - set(decayed) - set(plain)) == sorted(expected["excluded_frozen"])
    record("param_groups", f"norm_last_layer={norm_last_layer}", 0.0, 0)
