"""Student, teacher and optimizer spread over the ranks (FSDP2: torch's `fully_shard`, after ZeRO stage 3, arXiv
1910.02054).

The attention and MLP of a block, and every large head, are gathered when they run and let go after; what is left
(norms, embeddings, tokens, small heads, SiT's task weights) is one more group, gathered for the whole of a training
step. Averages of weights and clipping work on each rank's part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from vit_suite import distributed
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone


class Sharded:
    """Shards `method` over the ranks of its device mesh, once, and gathers it again for whoever needs all of it.

    bf16: the linear layers of blocks, which autocast rounds to bf16 anyway, travel in it: half the bytes. Norms and
    heads stay fp32.
    """

    def __init__(self, method: pl.LightningModule, bf16: bool):
        self.method = method
        mesh: Any = method.device_mesh
        # A sharded module cannot be copied, and each of its forward passes is collective. So a twin without parameters
        # is kept.
        empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in method.parameters()}
        self.twin = copy.deepcopy(method, {id(mesh): mesh, **empty})
        mesh = mesh["data_parallel"]
        for part in list(method.modules()):
            if isinstance(part, Backbone):
                blocks: Any = part.vit.blocks
                for block in blocks:
                    if not (hasattr(block, "attn") and hasattr(block, "mlp")):
                        raise UserError(
                            f"trainer.strategy fsdp2: a {type(block).__name__} has no attention and MLP to shard; use"
                            " ddp."
                        )
                    distributed.shard([block.attn, block.mlp], mesh, torch.bfloat16 if bf16 else None)
        typed: Any = method  # a Method, whose file imports this one
        for part in typed.gathered_parts():
            distributed.shard(part, mesh)
        distributed.shard(method, mesh, forward="training_step")

    def whole(self) -> Any:
        """The method as one rank alone would have it, on every rank (all call this together)."""
        whole = copy.deepcopy(self.twin)
        whole.load_state_dict(
            {name: distributed.gathered(tensor) for name, tensor in self.method.state_dict().items()}, assign=True
        )
        return whole.to(self.method.device)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2, with checkpoints that are those of DDP: a run goes on under either, and on another number of
    ranks.

    Lightning names the optimizer's entries by all parameters of the model, the teacher's included, where DDP counts
    those the optimizer has; its loader also gives parameters that have no state yet (DINO's frozen last layer) one that
    has seen a step.
    """

    def __init__(self, ranks: int):
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _on_main(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """Tensors gathered on rank 0, in its CPU memory; nothing of worth elsewhere."""
        found = {}
        for name, value in state.items():
            full = distributed.gathered(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = full.cpu() if isinstance(full, Tensor) else full
        return found

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._on_main(self._module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: Any = ParallelStrategy.optimizer_state(self, optimizer)
        return {**state, "state": {index: self._on_main(entry) for index, entry in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only
        )  # ranks share the pages

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._module.state_dict()
        parts = {
            name: distributed.sharded_as(tensor, own.get(name, tensor))
            for name, tensor in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        found = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            names = [name for group in state["param_groups"] for name in group["params"]]
            entries = {
                name: {
                    key: distributed.sharded_as(value, parameter) if value.shape == parameter.shape else value
                    for key, value in state["state"][name].items()
                }
                for name, parameter in zip(names, parameters, strict=True)
                if name in state["state"]
            }
            found.append({**state, "state": entries})
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": found})
