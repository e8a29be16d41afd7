"""The figures of docs/scaling.md: what a step computes, keeps and sends, and on how many GPUs it pays. Prints Markdown.

    python scripts/scaling_table.py             # counted; no GPU, nothing is computed
    python scripts/scaling_table.py --decode    # JPEGs a second and core, measured

`scripts/scaling_check.py` measures a step of two ranks beside what the counts predict.

FLOPs and kept activations are counted on the suite's own networks with tensors that have shapes but no memory, with one
block and with two: what a step takes is linear in the blocks. A multiplication and an addition are two FLOPs;
elementwise work is left out.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vit_suite.config import BackboneConfig, DINOConfig, SiTConfig, SupervisedConfig, ViewsConfig
from vit_suite.data.decode import decode
from vit_suite.methods.base import Method
from vit_suite.methods.dino import DINO
from vit_suite.methods.sit import SiT
from vit_suite.methods.supervised import SupervisedViT, soft_cross_entropy
from vit_suite.models import blocks

NETWORKS = {
    "S/16": BackboneConfig(dim=384, depth=12, heads=6, patch_size=16),
    "B/16": BackboneConfig(dim=768, depth=12, heads=12, patch_size=16),
    "L/16": BackboneConfig(dim=1024, depth=24, heads=16, patch_size=16),
    "g/14": BackboneConfig(name="vit_giant_patch14_dinov2", depth=40, dim=1536, patch_size=14),
}
METHODS = ("DINO", "SiT", "supervised")
V3 = SiTConfig(
    rotation=False,
    contrastive="info_nce",
    contrastive_head="mlp",
    contrastive_dim=256,
    corruption="gmml",
    drop_area=0.5,
    drop_type=["zeros"],
    reconstruct="corrupted",
    decoder="mlp",
    loss_weights="fixed",
    temperature=0.2,
)
LOCAL = 8
PEAK, SUSTAINED, MEMORY = 989e12, 0.4, 80e9
"""FLOP/s of an H100 SXM in dense bf16 (data sheet), the share of it assumed here, and its bytes."""
LINKS = {"NVLink 450 GB/s": 450e9, "200 Gb/s": 25e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.125e9}
"""Bytes a second and GPU in one direction."""
CLUSTERS = [(8, "NVLink 450 GB/s"), *((ranks, link) for ranks in (64, 512) for link in list(LINKS)[1:])]
HIDDEN = 0.1
"""Share of a step that sending may take."""
GIB = 2**30


@dataclass
class Cost:
    """A step, for one image, and the network it is a step of. Every field is linear in the number of blocks."""

    trained: float
    """Parameters."""
    teacher: float
    """Parameters of the second network, which has no gradients."""
    flops: float
    """Of all forward passes and the backward pass."""
    backward: float
    kept: float
    """Bytes kept for the backward pass."""

    def at(self, two: Cost, depth: int) -> Cost:
        """This (one block) and `two` blocks, drawn out to `depth`."""
        return Cost(*(a + (depth - 1) * (b - a) for a, b in zip(vars(self).values(), vars(two).values(), strict=True)))


# Counted
# ----------------------------------------------------------------------------------------------------------------------


def build(method: str, backbone: BackboneConfig) -> Method:
    """The module on the meta device."""
    backbone = replace(backbone, drop_path=0.0, image_size=[224, 224])
    views = ViewsConfig(local_size=local_size(backbone), local_crops=LOCAL)
    with torch.device("meta"):
        if method == "DINO":
            return DINO(DINOConfig(), backbone, views)
        if method == "SiT":
            return SiT(V3, backbone)
        return SupervisedViT(SupervisedConfig(), backbone)


def local_size(backbone: BackboneConfig) -> int:
    """96 pixels, or the nearest side that the patch divides."""
    return round(96 / backbone.patch_size) * backbone.patch_size


def networks(module: Method) -> tuple[nn.Module, nn.Module]:
    """What is trained, and what follows it."""
    return (module.network, module.average) if isinstance(module, SupervisedViT) else (module.student, module.teacher)


def fake(module: nn.Module) -> None:
    """Give a module of the meta device tensors that say they are on a CPU; inside FakeTensorMode."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(torch.empty(tensor.shape), tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)


def step_loss(module: Method, images: int) -> Tensor:
    """What a training step computes before the backward pass, less drawing views."""
    view = torch.empty(images, 3, 224, 224)
    if isinstance(module, DINO):
        side = module.views_config.local_size
        return module.losses([view, view.clone()] + [torch.empty(images, 3, side, side) for _ in range(LOCAL)])["loss"]
    if isinstance(module, SiT):
        both = torch.cat([view, view])
        output = module.student(both)
        with torch.no_grad():
            module.teacher.contrastive_head(module.teacher.backbone(both))
        return output.embedding.float().sum() + (output.pixels - both).abs().mean()
    return soft_cross_entropy(module.network(view), torch.empty(images, 1000))


@contextmanager
def keeping(found: dict[int, Tensor]) -> Iterator[None]:
    """Collects the storages that autograd keeps."""

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def counted(method: str, backbone: BackboneConfig) -> Cost:
    """By the difference of four images and two, so that what is there once (casts of weights) drops out."""
    module = build(method, backbone)
    trained, teacher = (sum(p.numel() for p in network.parameters()) for network in networks(module))
    found = []
    with FakeTensorMode(), patch.dict(blocks.PLAIN, clear=True):  # the fused kernel, as on a GPU
        fake(module)
        for images in (2, 4):
            kept: dict[int, Tensor] = {}
            forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
            with keeping(kept), forward, torch.autocast("cpu", torch.bfloat16):
                loss = step_loss(module, images)
            with backward:
                loss.backward()
            size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
            found.append((forward.get_total_flops(), backward.get_total_flops(), size))
    forward, backward, size = ((b - a) / 2 for a, b in zip(*found, strict=True))
    return Cost(trained, teacher, forward + backward, backward, size)


def tokens(method: str, backbone: BackboneConfig) -> int:
    """Tokens that an image puts through the trained network."""
    grid = 224 // backbone.patch_size
    local = local_size(backbone) // backbone.patch_size
    views = {"DINO": [grid] * 2 + [local] * LOCAL, "SiT": [grid] * 2, "supervised": [grid]}[method]
    return sum(side * side + 1 for side in views)


def with_checkpoints(one: Cost, two: Cost, method: str, backbone: BackboneConfig) -> float:
    """Bytes an image keeps with backbone.checkpointing: the fp32 input of every block, one block, and what is not in
    blocks."""
    block = two.kept - one.kept
    return one.kept - block + block + backbone.depth * tokens(method, backbone) * backbone.dim * 4


def markdown(header: list[str], rows: list[list[object]]) -> str:
    """A table; numbers with three digits."""
    shown = [
        [
            f"{cell:,.0f}"
            if isinstance(cell, float) and cell >= 100
            else f"{cell:.3g}"
            if isinstance(cell, float)
            else str(cell)
            for cell in row
        ]
        for row in rows
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_counts(decoded: float) -> None:
    """The tables that follow from the networks alone; `decoded`: images that a core decodes in a second."""
    costs, memory, work, sent, busy = {}, [], [], [], []
    for method in METHODS:
        for name, backbone in NETWORKS.items():
            one, two = (counted(method, replace(backbone, depth=depth)) for depth in (1, 2))
            cost = costs[method, name] = one.at(two, backbone.depth)
            what = f"{method} {name}"
            memory.append([what, *memory_of(cost, with_checkpoints(one, two, method, backbone))])
            rate = SUSTAINED * PEAK / cost.flops
            work.append([what, cost.flops / 1e9, rate, 8 * rate, str(math.ceil(8 * rate / decoded))])
            sent.append([what, 4 * cost.trained / 1e6, 1e3 / rate, *(1e3 * sending(cost, 64, link) for link in LINKS)])
            busy.append([what, *(images_needed(cost, ranks, link) for ranks, link in CLUSTERS)])
    state = ["trained, M", "teacher, M", "state, GiB", "DDP's buckets, GiB", "state on 8 GPUs with fsdp2, GiB"]
    print("### Memory\n")
    print(markdown(["", *state, "kept an image, GiB", "checkpointed, GiB", "images in 80 GB", "checkpointed"], memory))
    print("\n### Work\n")
    print(markdown(["", "GFLOP an image", "images/s a GPU", "images/s of 8 GPUs", "cores that decode them"], work))
    print("\n### Sending\n")
    print(markdown(["", "gradients, MB", "compute an image, ms", *(f"all-reduce {link}, ms" for link in LINKS)], sent))
    print("\n### Images a GPU\n")
    print(markdown(["", *(f"{ranks} GPUs, {link}" for ranks, link in CLUSTERS)], busy))
    print("\n### kNN\n")
    print_knn(costs)


def memory_of(cost: Cost, small: float) -> list[object]:
    """A row of the memory table; `small`: bytes an image keeps with checkpointing."""
    state, bucket = (
        16 * cost.trained + 4 * cost.teacher,
        4 * cost.trained,
    )  # weights, gradients, two moments; DDP copies gradients
    room = 0.9 * MEMORY - state - bucket
    fit = [str(int(room / size)) for size in (cost.kept, small)]
    return [
        cost.trained / 1e6,
        cost.teacher / 1e6,
        state / GIB,
        bucket / GIB,
        state / 8 / GIB,
        cost.kept / GIB,
        small / GIB,
        *fit,
    ]


def sending(cost: Cost, ranks: int, link: str) -> float:
    """Seconds of a ring all-reduce of fp32 gradients."""
    return 2 * (ranks - 1) / ranks * 4 * cost.trained / LINKS[link]


def images_needed(cost: Cost, ranks: int, link: str) -> str:
    """Images a GPU for which sending takes HIDDEN of the computing; and for which it fits beside the backward pass."""
    time = sending(cost, ranks, link) * SUSTAINED * PEAK
    return f"{math.ceil(time / (HIDDEN * cost.flops))} / {math.ceil(time / cost.backward)}"


def print_knn(costs: dict[tuple[str, str], Cost], bank: int = 1_281_167, queries: int = 50_000) -> None:
    """ImageNet's two splits: features of all images, then one product of matrices."""
    rows = []
    for name, backbone in NETWORKS.items():
        cost = costs["supervised", name]
        features = (cost.flops - cost.backward) * (bank + queries) / (SUSTAINED * PEAK)
        rows.append([name, features, 2 * bank * queries * backbone.dim / 1e12, 4 * bank * backbone.dim / GIB])
    print(markdown(["", "features on one GPU, s", "similarities, TFLOP", "bank in fp32, GiB"], rows))


# Measured
# ----------------------------------------------------------------------------------------------------------------------


def photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels with the spectrum of photographs (amplitude 1 / frequency)."""
    random = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / 500)
    common = random.standard_normal((375, 500))
    layers = [
        np.fft.irfft2(np.fft.rfft2(common + 0.3 * random.standard_normal((375, 500))) * falloff, s=(375, 500))
        for _ in range(3)
    ]
    pixels = (
        np.stack([120 + 55 * (layer - layer.mean()) / layer.std() for layer in layers], -1)
        .clip(0, 255)
        .astype(np.uint8)
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def print_decoding(count: int = 40, rounds: int = 5) -> None:
    """The suite's decoder, in CPU time, so that neighbours on the machine do not count."""
    files = [photograph(seed) for seed in range(count)]
    rates = []
    for _ in range(rounds):
        started = time.process_time()
        for file in files:
            decode("photograph.jpg", content=file)
        rates.append(count / (time.process_time() - started))
    print(
        f"{np.mean([len(file) for file in files]) / 1e3:.0f} kB a file; {statistics.median(rates):.0f} images a second and core "  # noqa: E501
        f"({min(rates):.0f} to {max(rates):.0f})"
    )


def main() -> None:
    """Parses the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", action="store_true", help="measure the decoder")
    parser.add_argument(
        "--decoded",
        type=float,
        default=690,
        help="images a second and core for the tables (default: what --decode gave)",
    )
    options = parser.parse_args()
    if options.decode:
        print_decoding()
    else:
        print_counts(options.decoded)


if __name__ == "__main__":
    main()
