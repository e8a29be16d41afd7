"""Warns in plain words when self-distillation collapses, the most common complaint of DINO's users (dino#246,
dinov2#407)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vit_suite import distributed


@torch.no_grad()
def distillation_signs(loss: Tensor, target: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Values that tell learning from collapse, over the images of all ranks.

    Args:
        loss: scalar, the cross-entropy between the CLS tokens' outputs.
        target: (2, B, K) the teacher's probabilities.
        features: (2, B, D) the teacher's CLS tokens.

    Returns:
        teacher_entropy and kl in nats; prototypes_used, the share of the prototypes that are the first choice of some
        image; feature_std, the standard deviation of the L2-normalized features over the images, times sqrt(D) (1 means
        isotropic).
    """
    entropy = -torch.special.xlogy(target, target).sum(-1).mean()
    unit = torch.stack(
        [distributed.gather_rows(view) for view in torch.nn.functional.normalize(features.float(), dim=-1)]
    )
    used = distributed.gather_rows(target.argmax(-1).T).unique().numel()
    return {
        "teacher_entropy": entropy,
        "kl": loss - entropy,  # cross-entropy = entropy + KL, averaged over the same images
        "prototypes_used": target.new_tensor(used / target.shape[-1]),
        "feature_std": unit.flatten(0, 1).std(0).mean() * features.shape[-1] ** 0.5,
    }


class CollapseMonitor:
    """Watches logged values, and gives one sentence per kind of collapse.

    Args:
        prototypes: K. A uniform output has entropy and loss ln K.
        patience: logged steps in a row that must show a collapse before the sentence. The first ones of every run look
            uniform.
    """

    NEAR_UNIFORM_LOSS, NEAR_UNIFORM_ENTROPY = 0.995, 0.98
    """Shares of ln K above which loss and teacher entropy count as uniform. Healthy runs are above them only in their
    first steps."""
    PEAKED_ENTROPY, FEW_PROTOTYPES = 0.01, 2
    """Share of ln K below which the teacher's entropy is near 0, and how many prototypes all images may then share."""

    def __init__(self, prototypes: int, patience: int = 50):
        self.uniform = math.log(prototypes)
        self.patience = patience
        self.stuck = self.peaked = 0
        self.said: set[str] = set()

    def update(self, loss: float, teacher_entropy: float, prototypes_used: int) -> str | None:
        """Take the values of one logged step.

        Args:
            loss, teacher_entropy: in nats.
            prototypes_used: number of prototypes that are the first choice of some image.

        Returns:
            A sentence when a collapse has lasted `patience` logged steps, else None. A sharp teacher that uses many
            prototypes is no collapse.
        """
        flat = loss > self.NEAR_UNIFORM_LOSS * self.uniform
        flat &= teacher_entropy > self.NEAR_UNIFORM_ENTROPY * self.uniform
        sharp = teacher_entropy < self.PEAKED_ENTROPY * self.uniform and prototypes_used <= self.FEW_PROTOTYPES
        self.stuck = self.stuck + 1 if flat else 0
        self.peaked = self.peaked + 1 if sharp else 0
        if self.stuck >= self.patience and "stuck" not in self.said:
            self.said.add("stuck")
            return (
                f"the loss has stayed at ln K = {self.uniform:.4f} for {self.patience} logged steps: the output is"
                " uniform and nothing is learned. Lower method.warmup_teacher_temperature, raise optim.lr or shorten"
                " its warm-up, or lower method.out_dim."
            )
        if self.peaked >= self.patience and "peaked" not in self.said:
            self.said.add("peaked")
            limit = self.PEAKED_ENTROPY * self.uniform
            return (
                f"the teacher's entropy has stayed below {limit:.3f} for {self.patience} logged steps: every image goes"
                " to one prototype. Raise method.teacher_temperature, lower method.center_momentum, or lower optim.lr."
            )
        return None
