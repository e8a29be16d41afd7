"""BatchNorm over the rows of all ranks (what torch's SyncBatchNorm is on GPUs), on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit_suite import distributed


def _normed(layer: nn.BatchNorm1d | nn.BatchNorm2d, rows: Tensor) -> Tensor:
    """Normalize rows (M, C) by the statistics of the rows of all ranks (M on each), and update the running statistics.

    The mean comes first and the variance second, because mean(x^2) - mean(x)^2 loses digits.
    """
    with torch.autocast(rows.device.type, enabled=False):
        values, count = rows.float(), len(rows) * distributed.world_size()
        mean = distributed.sum_over_ranks(values.sum(0)) / count
        centered = values - mean
        variance = distributed.sum_over_ranks(centered.square().sum(0)) / count
        output = centered * torch.rsqrt(variance + layer.eps)
        if layer.affine:
            output = output * layer.weight + layer.bias
    with torch.no_grad():
        tracked, running_mean, running_var = layer.num_batches_tracked, layer.running_mean, layer.running_var
        assert tracked is not None and running_mean is not None and running_var is not None  # torch's defaults
        assert layer.momentum is not None
        tracked += 1
        running_mean.lerp_(mean, layer.momentum)
        running_var.lerp_(variance * (count / (count - 1)), layer.momentum)
    return output.to(rows.dtype)


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d of (B, D) whose training statistics are over the batches of all ranks. B is the same on all ranks.

    N ranks then compute what one rank computes from the whole batch: outputs, gradients (of a loss that DDP averages
    over ranks) and running statistics. In evaluation, and on one rank, it is torch's layer. The names in `state_dict`
    are torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed.active()):
            return super().forward(x)
        return _normed(self, x)


class BatchNorm2d(nn.BatchNorm2d):
    """The same for images (B, C, H, W), over B, H and W."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and distributed.active()):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        return _normed(self, rows.flatten(0, 2)).view_as(rows).permute(0, 3, 1, 2)
