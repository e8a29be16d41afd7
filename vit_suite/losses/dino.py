"""DINO's self-distillation loss (arXiv 2104.14294, equation 3; facebookresearch/dino main_dino.py `DINOLoss`).

Axes: q teacher views (the 2 global crops), v student views (global first), b images, k prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature) over prototypes, in fp32: (..., K) -> (..., K)."""
    return ((logits.float() - center) / temperature).softmax(dim=-1)


def dino_loss(
    student_logits: Tensor, teacher: Tensor, student_temperature: float, first: int = 0, views: int | None = None
) -> Tensor:
    """Cross-entropy between every student view and the teacher's other views, averaged over pairs and images.

        total, pairs = 0, 0
        for q in teacher views:
            for v in student views:
                if v != q:                       # the same crop is never its own target
                    total += mean over b of -sum over k of teacher[q, b, k] * log_softmax(student[v, b] / t)[k]
                    pairs += 1
        loss = total / pairs

    Args:
        student_logits: (V, B, K), global crops first, in the teacher's order.
        teacher: (Q, B, K) probabilities, no gradient.
        student_temperature: t, of the student's softmax.
        first, views: for a part of the loss. `student_logits` are then views `first` to `first + V` of `views` in all.
            Parts that contain each view once add up to the loss.

    Returns:
        Scalar in nats. ln K is the loss of a uniform student.
    """
    teacher = teacher.detach()
    count = len(teacher)
    log_student = torch.log_softmax(student_logits.float() / student_temperature, dim=-1)
    # Summed over q first, so that each student view reads K once. Not an einsum: its matrix product adds K terms one
    # after another, which at K = 3,000 was wrong by five units in the last place, and autocast would run it in bf16.
    both = range(first, min(first + len(log_student), count))  # views that the teacher has too
    others = torch.cat(
        [teacher[:0], *(torch.cat([teacher[:q], teacher[q + 1 :]]).sum(0, keepdim=True) for q in both)]
    )  # (both, B, K)
    own, rest = log_student.split([len(both), len(log_student) - len(both)])
    sums = torch.cat([(others * own).sum(-1), (teacher.sum(0) * rest).sum(-1)])  # (V, B)
    return -sums.mean(-1).sum() / (count * (views or len(log_student)) - count)


def updated_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """The running center of the teacher's logits (equation 4). `batch_mean` (K,) is their mean over views, images and
    ranks."""
    return center * momentum + batch_mean * (1.0 - momentum)
