"""Student, teacher and optimizer spread over the ranks (FSDP2: torch's `fully_shard`, after ZeRO stage 3, arXiv
1910.02054).

Three kinds of groups are gathered. The attention and MLP of a block are gathered while the block runs, and so is every
large head. All other parameters (norms, embeddings, tokens, small heads, SiT's task weights) form one group, which is
gathered for the whole of a training step. Averages of weights and clipping work on each rank's part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
    """The parts of a method that this rank holds. Gathers the method again for whoever needs all of it.

    Args:
        method: is sharded over the ranks of its device mesh.
        bf16: the linear layers of blocks travel in bf16, which autocast would round them to anyway: half the bytes.
            Norms and heads stay fp32.
    """

    def __init__(self, method: pl.LightningModule, bf16: bool):
        self.method = method
        mesh: Any = method.device_mesh
        # A sharded module cannot be copied, and each of its forward passes needs all ranks. Its twin can be copied, and
        # has parameters without values.
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

    def whole(self, parts: Sequence[str] = ()) -> Any:
        """A copy of the method as one rank alone would have it, on every rank (all call this together).

        Args:
            parts: names of functions of the method that give modules, or None. Only the values of these modules are
                gathered, so that scoring a backbone does not need the memory of student, teacher and heads. Empty:
                everything is gathered.
        """
        whole = copy.deepcopy(self.twin)
        wanted = [getattr(whole, part)() for part in parts] if parts else [whole]
        wanted = [module for module in wanted if module is not None]
        needed = {id(tensor) for module in wanted for tensor in module.state_dict(keep_vars=True).values()}
        names = [name for name, tensor in whole.state_dict(keep_vars=True).items() if id(tensor) in needed]
        state = self.method.state_dict()
        whole.load_state_dict(
            {name: distributed.gathered(state[name]) for name in names}, assign=True, strict=not parts
        )
        for module in wanted:
            module.to(self.method.device)
        return whole


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 with checkpoints in DDP's format, so that a run can resume under either strategy and on another
    number of ranks.

    Lightning's own format differs in two ways. It numbers the optimizer's entries by all parameters of the model,
    the teacher's included, where DDP counts only those of the optimizer. And its loader gives a state that has seen a
    step to parameters that have none yet (DINO's frozen last layer).
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
        """The entries with all tensors gathered in rank 0's CPU memory; an empty dict on the other ranks."""
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
