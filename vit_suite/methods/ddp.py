"""DDP on CPUs whose gradients have the same bits before and after a resume."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from vit_suite import distributed


class OrderedDDP(DDPStrategy):
    """Adds the gradients of all ranks in the order of ranks.

    A ring adds an element in an order that depends on its place in a bucket, and DDP lays its buckets out anew after
    its first step. From three ranks on, the first step after a resume would so differ in its last bits from that of a
    run that never stopped. Ranks exchange N instead of 2 times the gradients: for CPUs, where bits are promised; GPUs
    keep Lightning's DDP.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if isinstance(self.model, DistributedDataParallel):  # not when a method is only evaluated
            self.model.register_comm_hook(None, distributed.mean_in_order)
