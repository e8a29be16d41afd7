"""iBOT's loss on masked patches (Zhou et al. 2021, arXiv 2111.07832, equation 2; facebookresearch/dinov2
dinov2/loss/ibot_patch_loss.py `forward_masked`).

Axes: M masked patches of all crops, V crops per image, B images, N patches of a crop, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ibot_loss(student_logits: Tensor, teacher: Tensor, temperature: float, weights: Tensor, crops: int) -> Tensor:
    """Cross-entropy between the student's output for each masked patch and the teacher's for the same patch.

        total = 0
        for i in masked patches:
            total += weights[i] * -sum over k of  teacher[i, k] * log_softmax(student[i] / temperature)[k]
        loss = total / crops

    Args:
        student_logits: (M, K) of the masked patches, from masked crops.
        teacher: (M, K) probabilities of the same patches, from whole crops; no gradient.
        temperature: of the student's softmax.
        weights: (M,) 1 / number of masked patches in the crop of the patch; 0 for rows that only fill a buffer.
        crops: V B, the number of crops that may be masked. Crops without a mask count in this mean, as in DINOv2.

    Returns:
        Scalar in nats. With equal `crops` on all ranks, the mean over ranks is the loss of all crops.
    """
    log_student = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    # Rows that only fill a buffer may hold infinity, and 0 times infinity is NaN. So they are left out.
    each = -(teacher.detach() * log_student).sum(-1)
    return torch.where(weights > 0, each * weights, 0).sum() / crops


def patch_weights(masks: Tensor) -> Tensor:
    """(V B, N) bool masks -> (V B, N) weights: 1 / number of masked patches of the crop where masked, else 0."""
    return masks / masks.sum(-1, keepdim=True).clamp(min=1)
