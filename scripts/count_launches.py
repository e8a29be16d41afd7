"""Operators that a GPU step of DINO ViT-S/16 launches, by part, counted without a GPU: a GPU that finishes one sooner
than Python launches the next one waits for Python.

    python scripts/count_launches.py [--images 128] [--output launches.json]

Tensors on the `meta` device have shapes and no values, and the code treats them as it treats a GPU's. So the views and
the step take their branches for a GPU, and a read of a value, which would make a GPU wait, raises an error.

Each operator counts as one launch, except views of memory, which launch nothing, and `_foreach` operators, which take
one launch for about 30 to 110 tensors. `casts` are copies to another type; autocast to bf16 is imitated by CUDA's lists
of operators (torch/csrc/autocast_mode.h). `copies` are copies from the host to the device. Lightning and logging are
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit_suite.config import BackboneConfig, DINOConfig, ViewsConfig
from vit_suite.data.packed import Packed, packed
from vit_suite.methods.dino import DINO
from vit_suite.reports.results import table
from vit_suite.views.draw import alone

META = torch.device("meta")
SIDES = [(375, 500)] * 9 + [(500, 375)] * 3 + [(333, 500)] * 2 + [(500, 333), (400, 400), (250, 300), (768, 1024)]
"""Heights and widths of photographs, about as often as in ImageNet."""
PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
"""Tensors that one launch of a `_foreach` operator takes, by its number of lists (MultiTensorApply.cuh)."""
SILENT = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
}
"""Operators that launch nothing, besides those that return views."""
LOW = {
    functional.linear,
    functional.conv2d,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.mm,
    Tensor.__matmul__,
}
HIGH = {
    functional.layer_norm,
    functional.normalize,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    torch.sum,
    Tensor.sum,
    torch.norm,
    Tensor.norm,
    torch.cumsum,
    Tensor.cumsum,
    torch._weight_norm,
}
"""Functions that autocast runs in the lower precision, and in fp32, of those that the methods call."""


class Launches(TorchDispatchMode):
    """Counts the operators that run on `meta`, under the part that `part` names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.operators: dict[str, Counter[str]] = {}
        self.part = "nothing"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in [*inputs, *outputs]):
            self._count(func, inputs, outputs)
        return result

    def _count(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func._schema.name.split("::")[1]
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        if name in SILENT or is_view:
            return
        part, number = self.part, 1
        if name in ("_to_copy", "copy_") and not all(tensor.is_meta for tensor in inputs):
            self.copies[part] += 1
        elif name == "_to_copy" and inputs[0].dtype != outputs[0].dtype and part in ("forward", "backward"):
            part = "casts"
        elif name.startswith(("_foreach", "_fused")):
            lists = max(1, sum("Tensor" in str(argument.type) and "[]" in str(argument.type) for argument in
                               func._schema.arguments))  # fmt: skip
            number = math.ceil(len(inputs) / lists / PER_LAUNCH.get(lists, 30))
        self.counts[part] += number
        self.operators.setdefault(part, Counter())[name] += number


class Autocast(TorchFunctionMode):
    """bf16 autocast of a GPU, imitated: the lists of functions, and the cast of a weight once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            q, k, v = (self.low(tensor) for tensor in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if func in LOW:
            return func(*(self.low(value) for value in args), **{key: self.low(value) for key, value in kwargs.items()})
        if func in HIGH:
            return func(*(value.float() if _on(value) else value for value in args), **kwargs)
        return func(*args, **kwargs)

    def low(self, value: Any) -> Any:
        """`value` in bf16, if it is a tensor of the device."""
        if not _on(value) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self.weights:
            self.weights[id(value)] = value, value.to(torch.bfloat16)
        return self.weights[id(value)][1]


def _on(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point()


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Lets torch.autocast and fused AdamW take the `meta` device, as if bf16 autocast were on."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    with (
        mock.patch.object(torch, "autocast", lambda device, **options: contextlib.nullcontext()),
        mock.patch.object(torch.amp, "is_autocast_available", lambda device: True),
        mock.patch.object(torch, "is_autocast_enabled", lambda device: True),
        mock.patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        mock.patch.object(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta", "cuda", "cpu"]),
    ):
        yield


def mixed(images: int) -> Packed:
    """Photographs on the host, uint8 (3, H_i, W_i), as the loader gives them."""
    return packed([torch.zeros(3, *SIDES[index % len(SIDES)], dtype=torch.uint8) for index in range(images)], slack=0)


def resident(images: int) -> Tensor:
    """Images on the device, uint8 (B, 3, 256, 256)."""
    return torch.zeros(images, 3, 256, 256, dtype=torch.uint8, device=META)


def vits16(images: int, width: int = 384) -> DINO:
    """DINO ViT-S/16 on the device, or a narrower network, which launches the same."""
    backbone = BackboneConfig(patch_size=16, dim=width, depth=12, heads=6, drop_path=0.1)
    head = {"out_dim": 65536} if width == 384 else {"out_dim": 64, "hidden_dim": 64, "bottleneck_dim": 16}
    method = DINO(DINOConfig(**head), backbone, ViewsConfig(), batch_size=images).train().to(META)
    method.max_steps = 100
    return method


def count(method: DINO, images: int, sources: Sequence[Callable[[int], Any]]) -> Launches:
    """The launches of one step, with the views of each of the sources (`mixed`, `resident`) under its name."""
    launches, batches = Launches(), [(source.__name__, source(images)) for source in sources]
    with meta_as_gpu():
        optimizer = method.configure_optimizers()
        _step(method, optimizer, batches, images, Launches())  # the first step makes the moments, and fills caches
        _step(method, optimizer, batches, images, launches)
    return launches


def _step(method: DINO, optimizer: Any, batches: list[tuple[str, Any]], images: int, launches: Launches) -> None:
    draw, crops = alone(images), []
    with launches:
        for name, batch in batches:
            launches.part = f"transfer, {name}"
            batch = batch.to(META)  # as Lightning does
            launches.part = f"views, {name}"
            crops = method.crops(batch, draw)
        launches.part = "forward"
        with Autocast():
            values = method.losses(crops, draw=draw)
        launches.part = "backward"
        optimizer.zero_grad()
        values["loss"].backward()
        launches.part = "optimizer"
        method.configure_gradient_clipping(optimizer)
        optimizer.step()
        launches.part = "EMA"
        method.use_sums(values.sums)
        method.after_step(0)


def rows(launches: Launches) -> list[dict]:
    """A row for each part."""
    return [
        {"part": part, "launches": launches.counts[part], "copies": launches.copies[part]} for part in launches.counts
    ]


def main() -> None:
    """Parses the options, counts, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="images of a rank (default: 128)")
    parser.add_argument("--operators", action="store_true", help="print the operators of each part too")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    launches = count(vits16(options.images), options.images, (mixed, resident))
    found = rows(launches)
    print(table(list(found[0]), [list(row.values()) for row in found]))
    if options.operators:
        for part, operators in launches.operators.items():
            print(f"{part}: " + ", ".join(f"{name} {number}" for name, number in operators.most_common()))
    if options.output:
        options.output.write_text(json.dumps({"images": options.images, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
