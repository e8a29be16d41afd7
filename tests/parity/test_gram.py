"""Gram anchoring against DINOv3's GramLoss, every combination of its options."""

from __future__ import annotations

from itertools import product

from vit_suite.losses.gram import gram_loss

from .golden import largest_error, load_golden, record

NEGATIVES = {"keep": "keep", "noneg": "drop", "noteachneg": "drop_anchor"}


def test_gram_loss():
    _, tensors = load_golden("dinov3_gram")
    for normalize, within, negatives in product(("norm", "raw"), ("img", "batch"), NEGATIVES):
        name = f"{normalize}_{within}_{negatives}"
        student = tensors["student"].clone().requires_grad_()
        loss = gram_loss(student, tensors["teacher"], within == "img", normalize == "norm", NEGATIVES[negatives])
        loss.backward()
        golden = tensors[f"loss_{name}"]
        record("dinov3_gram", f"loss, {normalize}", largest_error(loss, golden), 1e-6 + 5e-7 * float(golden))
        record("dinov3_gram", f"gradient, {normalize}", largest_error(student.grad, tensors[f"grad_{name}"]), 2e-6)
