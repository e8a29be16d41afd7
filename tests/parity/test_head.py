"""Projection head against DINO's DINOHead: outputs and every gradient, all variants of the fixture."""

from __future__ import annotations

import torch

from vit_suite.models.heads import DINOHead

from .golden import largest_error, load_golden, record, with_prefix

FORWARD, GRADIENT, GRADIENT_BATCH_NORM = 1e-5, 1e-5, 1e-4


def test_head():
    hyper, tensors = load_golden("dino_head")
    assert hyper["variants"]
    for variant, options in hyper["variants"].items():
        head = DINOHead(
            options["in_dim"],
            options["out_dim"],
            options["hidden_dim"],
            options["bottleneck_dim"],
            options.get("nlayers", 3),
            options.get("use_bn", False),
            options["norm_last_layer"],
        )
        golden = with_prefix(tensors, f"{variant}.")
        head.load_state_dict(with_prefix(golden, "state."))
        x = golden["x"].requires_grad_()
        out = head(x)
        record("dino_head", "logits", largest_error(out, golden["out"]), FORWARD)
        (out * golden["r"]).sum().backward()
        gradients = {"x": x.grad} | {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
        expected = with_prefix(golden, "grad.")
        assert set(gradients) == set(expected)  # a frozen gain has no gradient, a free one has
        what, tolerance = (
            ("gradients, BatchNorm", GRADIENT_BATCH_NORM) if options.get("use_bn") else ("gradients", GRADIENT)
        )
        for name, gradient in gradients.items():
            record("dino_head", what, largest_error(gradient, expected[name]), tolerance)
        if "out_eval" in golden:
            with torch.no_grad():
                record(
                    "dino_head",
                    "logits, running statistics",
                    largest_error(head.eval()(x), golden["out_eval"]),
                    FORWARD,
                )
