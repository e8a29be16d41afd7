"""Says in plain words that self-distillation has stopped learning, the commonest complaint of DINO's users (dino#246,
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
        teacher_entropy and kl in nats; prototypes_used, the share of prototypes that are some image's first choice;
        feature_std, of the L2-normalized features over the images, times sqrt(D): 1 is isotropic.
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
    """Watches logged values and answers with one sentence, once per kind of collapse.

    Args:
        prototypes: K, so that a uniform output has entropy and loss ln K.
        patience: logged values in a row that must agree before it speaks; the first logged values of every run look
        uniform.
    """

    def __init__(self, prototypes: int, patience: int = 50):
        self.uniform = math.log(prototypes)
        self.patience = patience
        self.stuck = self.peaked = 0
        self.said: set[str] = set()

    def update(self, loss: float, teacher_entropy: float, prototypes_used: int) -> str | None:
        """Take a logged step's loss and teacher entropy (nats), and how many prototypes are some image's first choice.

        Returns a sentence when collapse has lasted `patience` logged steps. A sharp teacher alone is none: it may be
        sharp on many prototypes.
        """
        self.stuck = self.stuck + 1 if loss > 0.995 * self.uniform and teacher_entropy > 0.98 * self.uniform else 0
        self.peaked = self.peaked + 1 if teacher_entropy < 0.01 * self.uniform and prototypes_used <= 2 else 0
        if self.stuck >= self.patience and "stuck" not in self.said:
            self.said.add("stuck")
            return (
                f"the loss has stayed at ln K = {self.uniform:.4f} for {self.patience} logged steps: the output is"
                " uniform and nothing is learned. Lower method.warmup_teacher_temperature, raise optim.lr or shorten"
                " its warm-up, or lower method.out_dim."
            )
        if self.peaked >= self.patience and "peaked" not in self.said:
            self.said.add("peaked")
            return (
                f"the teacher's entropy has stayed below {0.01 * self.uniform:.3f} for {self.patience} logged steps:"
                " every image goes to one prototype. Raise method.teacher_temperature, lower method.center_momentum,"
                " or lower optim.lr."
            )
        return None
