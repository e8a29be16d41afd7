"""How ranks share a step under DDP: buffers are not broadcast, and CPUs add gradients in a fixed order."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vit_suite import distributed
from vit_suite.models.batch_norm import BatchNorm1d, BatchNorm2d


def own_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm layer takes its statistics from one rank alone, so that its buffers differ between ranks."""
    norms = (part for part in module.modules() if isinstance(part, _BatchNorm))
    return not all(isinstance(norm, BatchNorm1d | BatchNorm2d) for norm in norms)


class QuietDDP(DDPStrategy):
    """Lightning's DDP without the broadcast of all buffers before every forward pass.

    The buffers of a method are equal on all ranks by construction: centers move by means over ranks, BatchNorm takes
    its statistics from all ranks (models/batch_norm.py), and other buffers never change. With a BatchNorm layer of
    another kind buffers are broadcast as usual.
    """

    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        self._ddp_kwargs.setdefault("broadcast_buffers", own_statistics(self.lightning_module))
        super().configure_ddp()


class OrderedDDP(QuietDDP):
    """DDP that adds the gradients of all N ranks in the order of ranks. For CPUs.

    A ring all-reduce adds in an order that depends on the place of an element in its bucket, and DDP changes its
    buckets after the first step. From three ranks on, the first step after a resume would then differ in its last bits
    from the same step of a run that was not interrupted. Here each rank receives N times the gradients instead of
    twice. On GPUs, where equal bits are not promised, `QuietDDP` is used.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if isinstance(self.model, DistributedDataParallel):  # not when a method is only evaluated
            self.model.register_comm_hook(None, distributed.mean_in_order)
