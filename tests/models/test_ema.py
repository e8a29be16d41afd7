"""The EMA teacher and its start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_suite.models.ema import assert_twins, copy_weights, ema_update


def pair() -> tuple[nn.Module, nn.Module]:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    copy_weights(teacher, student)
    return teacher, student


def test_update_is_the_weighted_mean():
    teacher, student = pair()
    before = teacher.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, 0.9 * before + 0.1 * student.weight)
    ema_update(teacher, student, 0.0)
    torch.testing.assert_close(teacher.weight, student.weight)


def test_twins_pass_and_the_teacher_has_no_gradient():
    teacher, student = pair()
    assert_twins(teacher, student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_different_start_is_found():
    teacher, student = pair()
    with torch.no_grad():
        teacher.bias[0] += 1e-6
    with pytest.raises(RuntimeError, match="start with different bias"):
        assert_twins(teacher, student)


def test_shared_storage_is_found():
    teacher, student = pair()
    teacher.weight = student.weight
    with pytest.raises(RuntimeError, match="share the storage of weight"):
        assert_twins(teacher, student)
