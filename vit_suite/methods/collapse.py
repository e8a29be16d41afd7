"""Says in plain words that self-distillation has stopped learning, the commonest complaint of DINO's users (dino#246,
dinov2#407)."""

from __future__ import annotations

import math


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
