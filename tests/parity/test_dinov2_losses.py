"""Losses and targets against DINOv2's DINOLoss, iBOTPatchLoss and KoLeoLoss over successive steps."""

from __future__ import annotations

import torch

from vit_suite.losses.dino import dino_loss, teacher_probabilities, updated_center
from vit_suite.losses.ibot import ibot_loss, patch_weights
from vit_suite.losses.koleo import koleo_loss
from vit_suite.losses.sinkhorn import sinkhorn_knopp

from .golden import largest_error, load_golden, record

FIXTURE = "dinov2_losses"
KOLEO_WEIGHT = 0.1


def loss_tolerance(golden: torch.Tensor) -> float:
    return 1e-5 + 2e-7 * float(golden.abs())


def reversed_crops(rows: torch.Tensor) -> torch.Tensor:
    """(2, B, K) as rows with crop B first: the official code turns the teacher's crops round."""
    return rows.flip(0).flatten(0, 1)


def check(what: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float | None = None) -> None:
    record(FIXTURE, what, largest_error(ours, golden), loss_tolerance(golden) if tolerance is None else tolerance)


def test_targets_and_losses():
    hyper, tensors = load_golden(FIXTURE)
    batch, local, student_temperature = hyper["batch"], hyper["locals"], hyper["student_temp"]
    views = 2 + local
    center, patch_center = torch.zeros(hyper["out_dim"]), torch.zeros(hyper["out_dim"])
    for step in range(hyper["steps"]):
        temperature = float(tensors[f"teacher_temp_{step}"])
        golden = {name.removesuffix(f"_{step}"): value for name, value in tensors.items() if name.endswith(f"_{step}")}
        masks = golden["masks"]
        weights = patch_weights(masks)[masks]
        check("masks_weight", weights, golden["masks_weight"], 1e-7)
        check("center used", center, golden["dino_center_used"][0], 1e-6)
        check("patch center used", patch_center, golden["ibot_center_used"][0, 0], 1e-6)
        cls, patches = golden["teacher_cls"].unflatten(0, (2, batch)), golden["teacher_patch"]
        targets = {
            "softmax": (
                teacher_probabilities(cls, center, temperature),
                teacher_probabilities(patches, patch_center, temperature),
            ),
            "sinkhorn": (
                sinkhorn_knopp(cls.flatten(0, 1), temperature).unflatten(0, (2, batch)),
                sinkhorn_knopp(patches, temperature),
            ),
        }
        tokens = golden["cls_feat"].unflatten(0, (2, batch)).clone().requires_grad_()
        spread = [koleo_loss(view) for view in tokens]
        for name, value in zip("AB", spread, strict=True):
            check("KoLeo", value, golden[f"koleo_crop{name}"], 5e-6)
        sum(spread).backward()
        check("KoLeo", sum(spread), golden["koleo_sum"], 5e-6)
        check("gradient of KoLeo", tokens.grad.flatten(0, 1), golden["grad_koleo_sum"], 1e-5)
        for kind, (target, patch_target) in targets.items():
            check(f"{kind} probabilities", reversed_crops(target), golden[f"dino_{kind}_probs"], 2e-6)
            check(f"{kind} probabilities of patches", patch_target, golden[f"ibot_{kind}_probs"], 2e-6)
            student = torch.cat([golden["student_global"], golden["student_local"]]).unflatten(0, (views, batch))
            student.requires_grad_()
            # The suite's loss is the mean over all pairs of crops; the official parts are sums over pairs (local), and
            # the mean over both crops, each against the other (global).
            pairs = 2 + 2 * local
            of_local = pairs * dino_loss(student[2:], target, student_temperature, 2, views)
            of_global = pairs / 2 * dino_loss(student[:2], target, student_temperature, 0, views)
            check(f"local loss, {kind}", of_local, golden[f"dino_local_loss_{kind}"])
            check(f"global loss, {kind}", of_global, golden[f"dino_global_loss_{kind}"])
            gradient = torch.autograd.grad(of_local + of_global, student)[0].flatten(0, 1)
            check(
                f"gradient of the global loss, {kind}",
                gradient[: 2 * batch],
                golden[f"grad_dino_global_loss_{kind}"],
                1e-5,
            )
            check(
                f"gradient of the local loss, {kind}",
                gradient[2 * batch :],
                golden[f"grad_dino_local_loss_{kind}"],
                1e-5,
            )
            student_patch = golden["student_patch"].clone().requires_grad_()
            of_patches = ibot_loss(student_patch, patch_target, student_temperature, weights, 2 * batch)
            check(f"iBOT loss, {kind}", of_patches, golden[f"ibot_loss_{kind}"])
            gradient = torch.autograd.grad(of_patches, student_patch)[0]
            check(f"gradient of the iBOT loss, {kind}", gradient, golden[f"grad_ibot_loss_{kind}"], 1e-5)
            total = dino_loss(student, target, student_temperature) + KOLEO_WEIGHT * sum(spread) + of_patches
            check(f"total, {kind}", total, golden[f"total_{kind}"])
        center = updated_center(center, cls.mean((0, 1)), hyper["center_momentum"])
        patch_center = updated_center(patch_center, patches.mean(0), hyper["center_momentum"])
    check("final center", center, tensors["dino_center_final"][0], 1e-6)
    check("final patch center", patch_center, tensors["ibot_center_final"][0, 0], 1e-6)
    check("KoLeo of equal rows", koleo_loss(tensors["dup_feat"]), tensors["koleo_dup"], 5e-6)


def test_rows_that_fill_a_buffer_change_nothing():
    """The method hands over a buffer of fixed length, the end of which is no patch."""
    hyper, tensors = load_golden(FIXTURE)
    temperature, patches, masks = float(tensors["teacher_temp_0"]), tensors["teacher_patch_0"], tensors["masks_0"]
    filler = 1e4 * torch.randn(7, patches.shape[1], generator=torch.Generator().manual_seed(0))
    counted = torch.arange(len(patches) + 7) < len(patches)
    found = sinkhorn_knopp(torch.cat([patches, filler]), temperature, counted=counted)
    check("sinkhorn probabilities in a buffer", found[counted], tensors["ibot_sinkhorn_probs_0"], 2e-6)
    assert not found[~counted].any()
    weights = torch.cat([patch_weights(masks)[masks], torch.zeros(7)])
    student = torch.cat([tensors["student_patch_0"], filler])
    loss = ibot_loss(student, found, hyper["student_temp"], weights, 2 * hyper["batch"])
    check("iBOT loss in a buffer", loss, tensors["ibot_loss_sinkhorn_0"])
