"""Two ranks on this machine beside what scaling_table.py predicts: a step's wall and CPU time, and what FSDP2 sends.

python -m torch.distributed.run --nproc-per-node 2 scripts/scaling_check.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from scaling_table import markdown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from vit_suite import distributed
from vit_suite.config import BackboneConfig, DINOConfig, ViewsConfig
from vit_suite.methods.base import Method
from vit_suite.methods.dino import DINO
from vit_suite.methods.sharding import ShardedStrategy


class Step(nn.Module):
    """The loss of a method as a module's forward pass, as DDP wants it."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, crops: list[Tensor]) -> Tensor:
        return self.method.losses(crops)["loss"]


def seconds(work: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """Median wall time and CPU time of a call; the ranks begin each together."""
    found = []
    for _ in range(rounds + 1):
        distributed.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(statistics.median(times) for times in zip(*found[1:], strict=True))


def small() -> DINO:
    """A DINO that two cores train."""
    backbone = BackboneConfig(patch_size=8, dim=192, depth=6, heads=3, drop_path=0.0)
    views = ViewsConfig(global_size=64, local_size=32, local_crops=2, backend="device")
    return DINO(DINOConfig(out_dim=4096, hidden_dim=512, freeze_last_layer_epochs=0), backbone, views, batch_size=16)


def print_check(batch: int = 8) -> None:
    """One rank's step, the all-reduce, and the step of two ranks that the two predict, beside the measured one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = small()
    crops = [torch.randn(batch, 3, side, side) for side in (64, 64, 32, 32)]
    counter = FlopCounterMode(display=False)
    with counter:
        method.losses(crops)["loss"].backward()
    plain = Step(method)
    trained = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    buffer = torch.zeros(sum(parameter.numel() for parameter in trained))

    def alone() -> None:
        if distributed.rank() == 0:
            plain(crops).backward()

    one = seconds(alone)
    both = seconds(lambda: plain(crops).backward())
    reduce = seconds(lambda: distributed.mean_over_ranks(buffer))
    together = nn.parallel.DistributedDataParallel(plain)
    measured = seconds(lambda: together(crops).backward())
    if distributed.rank() == 0:
        flops, size = counter.get_total_flops(), 4 * buffer.numel()
        rows = [
            ["one rank alone", 1e3 * one[0], 1e3 * one[1]],
            ["two ranks, nothing sent", 1e3 * both[0], 1e3 * both[1]],
            ["all-reduce alone", 1e3 * reduce[0], 1e3 * reduce[1]],
            ["two ranks, predicted", 1e3 * (both[0] + reduce[0]), 1e3 * (both[1] + reduce[1])],
            ["two ranks, measured", 1e3 * measured[0], 1e3 * measured[1]],
        ]
        print(markdown(["", "wall, ms", "CPU, ms"], rows))
        print(
            f"\n{flops / 1e9:.1f} GFLOP a step: {flops / one[1] / 1e9:.1f} GFLOP/s by CPU time; {size / 1e6:.1f} MB of gradients: gloo "  # noqa: E501
            f"{size / reduce[0] / 1e9:.2f} GB/s; {batch} images a rank"
        )


class Traffic(TorchDispatchMode):
    """Adds up the bytes of tensors that are gathered and scattered, each as the whole that the ranks make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in self.bytes:
            self.bytes[name] += max(tensor.nbytes for tensor in args[:2])
        return func(*args, **(kwargs or {}))


def print_traffic(steps: int = 3) -> None:
    """What FSDP2 sends in a training step."""
    data = DataLoader(
        TensorDataset(torch.zeros(8 * steps, 3, 64, 64, dtype=torch.uint8), torch.zeros(8 * steps, dtype=torch.long)), 8
    )
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        method = small()
        weights = 4 * sum(parameter.numel() for parameter in method.student.parameters())
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ShardedStrategy(2),
            precision=precision,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with Traffic() as traffic:
            trainer.fit(method, data)
        if distributed.rank() == 0:
            gathered, scattered = (count / steps / weights for count in traffic.bytes.values())
            print(
                f"{precision}: gathers {gathered:.2f} and scatters {scattered:.2f} times the {weights / 1e6:.1f} MB of"
                " the student"
            )


def main() -> None:
    """Measures on the ranks that torchrun started."""
    with distributed.launched():
        print_check()
        print_traffic()


if __name__ == "__main__":
    main()
