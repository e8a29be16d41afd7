"""BatchNorm over the rows of all ranks (what torch's SyncBatchNorm is on GPUs), on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_suite import distributed


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d of (B, D) that in training takes its statistics from the batches of all ranks, which are of one
    size.

    N ranks so give the numbers of one rank with the whole batch: outputs, gradients (of a loss that DDP averages over
    ranks) and running
    statistics. Two passes, mean and then variance, because a mean of squares less the square of the mean loses digits.
    In evaluation, and on one rank, it is torch's own. The names in `state_dict` are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed.active()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            rows, count = x.float(), len(x) * distributed.world_size()
            mean = distributed.sum_over_ranks(rows.sum(0)) / count
            centerd = rows - mean
            variance = distributed.sum_over_ranks(centerd.square().sum(0)) / count
            output = centerd * torch.rsqrt(variance + self.eps)
            if self.affine:
                output = output * self.weight + self.bias
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output.to(x.dtype)
