"""DINO and iBOT losses against the original iBOT's class: CLS pairs across views, patches within a view."""

from __future__ import annotations

import torch

from vit_suite.losses.dino import dino_loss, teacher_probabilities, updated_center
from vit_suite.losses.ibot import ibot_loss, patch_weights
from vit_suite.optim.schedules import teacher_temperature

from .golden import largest_error, load_golden, record


def test_ibot_loss():
    hyper, tensors = load_golden("ibot_loss")
    batch, views = hyper["batch"], hyper["global_crops"] + hyper["local_crops"]
    schedules = []
    for suffix in ("", "2"):
        schedules.append(
            [
                teacher_temperature(
                    epoch,
                    hyper["warmup_teacher_temp_epochs"],
                    hyper[f"warmup_teacher_temp{suffix}"],
                    hyper[f"teacher_temp{suffix}"],
                )
                for epoch in range(hyper["nepochs"])
            ]
        )
        golden = tensors[f"teacher_temp{suffix}_schedule"]
        record("ibot_loss", "teacher temperatures", largest_error(schedules[-1], golden), 1e-15)
    center, patch_center = torch.zeros(hyper["out_dim"]), torch.zeros(hyper["patch_out_dim"])
    for call, epoch in enumerate(hyper["epochs"]):
        record("ibot_loss", "centers", largest_error(center, tensors[f"center1_used_{call}"][0]), 1e-7)
        record("ibot_loss", "centers", largest_error(patch_center, tensors[f"center2_used_{call}"][0, 0]), 1e-7)
        teacher, teacher_patch = tensors[f"teacher_cls_{call}"], tensors[f"teacher_patch_{call}"]
        student = torch.cat([tensors[f"student_cls_{call}"], tensors[f"student_local_{call}"]])
        student, patches = student.requires_grad_(), tensors[f"student_patch_{call}"].clone().requires_grad_()
        target = teacher_probabilities(teacher, center, schedules[0][epoch]).unflatten(0, (-1, batch))
        of_cls = hyper["lambda1"] * dino_loss(student.unflatten(0, (views, batch)), target, hyper["student_temp"])
        masks = tensors[f"masks_{call}"].flatten(2).flatten(0, 1)  # (G B, N)
        patch_target = teacher_probabilities(teacher_patch, patch_center, schedules[1][epoch])
        of_patches = hyper["lambda2"] * ibot_loss(
            patches[masks], patch_target[masks], hyper["student_temp"], patch_weights(masks)[masks], len(masks)
        )
        (of_cls + of_patches).backward()
        record("ibot_loss", "CLS loss", largest_error(of_cls, tensors[f"loss_cls_{call}"]), 1e-5)
        record("ibot_loss", "patch loss", largest_error(of_patches, tensors[f"loss_patch_{call}"]), 1e-5)
        record("ibot_loss", "loss", largest_error(of_cls + of_patches, tensors[f"loss_{call}"]), 1e-5)
        golden = torch.cat([tensors[f"grad_student_cls_{call}"], tensors[f"grad_student_local_{call}"]])
        record("ibot_loss", "gradients", largest_error(student.grad, golden), 2e-6)
        record("ibot_loss", "gradients", largest_error(patches.grad, tensors[f"grad_student_patch_{call}"]), 2e-6)
        center = updated_center(center, teacher.mean(0), hyper["center_momentum"])
        # The original takes all patches into the center, DINOv2 and this suite's method the masked ones.
        patch_center = updated_center(patch_center, teacher_patch.mean((0, 1)), hyper["center_momentum2"])
    record("ibot_loss", "centers", largest_error(center, tensors["center1_final"][0]), 1e-7)
    record("ibot_loss", "centers", largest_error(patch_center, tensors["center2_final"][0, 0]), 1e-7)
