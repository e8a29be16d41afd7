"""Loss, its gradient, the center and the temperature against DINO's DINOLoss, over successive calls."""

from __future__ import annotations

import math

import torch

from vit_suite.losses.dino import dino_loss, teacher_probabilities, updated_center
from vit_suite.optim.schedules import teacher_temperature

from .golden import largest_error, load_golden, record


def test_dino_loss():
    hyper, tensors = load_golden("dino_loss")
    temperatures = [
        teacher_temperature(
            epoch, hyper["warmup_teacher_temp_epochs"], hyper["warmup_teacher_temp"], hyper["teacher_temp"]
        )
        for epoch in range(hyper["nepochs"])
    ]
    record("dino_loss", "teacher temperature", largest_error(temperatures, tensors["teacher_temp_schedule"]), 1e-15)
    center = torch.zeros(hyper["out_dim"])
    for call, epoch in enumerate(hyper["epochs"]):
        student = tensors[f"student_{call}"].unflatten(0, (hyper["ncrops"], hyper["batch"])).requires_grad_()
        teacher = tensors[f"teacher_{call}"]
        target = teacher_probabilities(teacher, center, temperatures[epoch]).unflatten(0, (2, hyper["batch"]))
        loss = dino_loss(student, target, hyper["student_temp"])
        loss.backward()
        center = updated_center(center, teacher.mean(0), hyper["center_momentum"])
        # 1e-6, or three units in the last place where fp32 is coarser than that (one unit is 9.5e-7 from a loss of 8
        # on).
        tolerance = max(1e-6, 3 * torch.finfo(torch.float32).eps * 2 ** math.floor(math.log2(loss.item())))
        record("dino_loss", "loss", largest_error(loss, tensors[f"loss_{call}"]), tolerance)
        record(
            "dino_loss", "gradient", largest_error(student.grad.flatten(0, 1), tensors[f"grad_student_{call}"]), 1e-6
        )
        record("dino_loss", "center", largest_error(center, tensors[f"center_{call}"][0]), 1e-6)
