"""What DINO and DINOv2 share: a student that is trained, and a teacher that is the average of its weights."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from vit_suite import distributed
from vit_suite.methods.base import Losses, Method
from vit_suite.methods.collapse import CollapseMonitor
from vit_suite.models.backbone import Backbone
from vit_suite.models.ema import assert_twins, ema_update
from vit_suite.optim.schedules import cosine

log = logging.getLogger("vit_suite")

GLOBAL_CROPS = 2
"""Crops that the teacher sees: the first ones of each image."""


class SelfDistillation(Method):
    """A student and its teacher. The teacher is scored and exported.

    `build` of a subclass has to set `student`, `teacher` (each with a `backbone`) and `monitor`. The options need
    `momentum_teacher` and `out_dim`.
    """

    student: Any
    teacher: Any
    monitor: CollapseMonitor

    def trained(self) -> nn.Module:
        return self.student

    def evaluation_backbone(self) -> Backbone:
        return self.teacher.backbone

    def networks(self) -> dict[str, nn.Module]:
        return {"student forward": self.student, "teacher forward": self.teacher}

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_step == 0:  # in a resumed run the teacher already lags behind
            assert_twins(self.teacher, self.student)

    def watch(self, values: Losses) -> None:
        """Warn once of a collapse."""
        used = round(float(values["prototypes_used"]) * self.method.out_dim)
        loss = float(values.get("dino", values["loss"]).detach())
        sentence = self.monitor.update(loss, float(values["teacher_entropy"]), used)
        if sentence and distributed.rank() == 0:
            log.warning("%s", sentence)

    def after_step(self, step: int) -> None:
        """Move the teacher."""
        ema_update(self.teacher, self.student, cosine(step, self.max_steps, self.method.momentum_teacher, 1.0))
