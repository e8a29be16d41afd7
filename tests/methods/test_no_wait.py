"""A training step never makes the host wait for the GPU: what it does not read, it queues, and the GPU always has work.

With a GPU torch itself raises where it would wait. Without one the same steps run on the `meta` device, whose tensors
have shapes and no
values: whatever reads one (`item`, `bool`, `tolist`, `nonzero`, boolean indices, copies to the host) raises, and two
modes raise for host
tensors that go there other than through `hardware.send`. Lightning's loop is in both. Logged steps, the first of an
epoch, where labels are checked, and the optimizer's fused kernel, which `meta` lacks, are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from vit_suite import DINO, MAE, DINOv2, SiT, SupervisedViT
from vit_suite.config import (
    BackboneConfig,
    DINOConfig,
    SiTConfig,
    SiTViewsConfig,
    SupervisedConfig,
    SupervisedViewsConfig,
    ViewsConfig,
)
from vit_suite.config.dinov2 import DINOv2Config, DINOv2ViewsConfig
from vit_suite.config.mae import MAEConfig, MAEViewsConfig
from vit_suite.data.loader import ResidentLoader
from vit_suite.data.order import EpochPlan
from vit_suite.data.shapes import ShapesSource
from vit_suite.data.source import ResidentSource
from vit_suite.methods.base import Method

BACKBONE = BackboneConfig(patch_size=8, dim=24, depth=2, heads=3)
BATCH, STEPS, WARM = 16, 4, 2
META = torch.device("meta")


def dino(**options) -> DINO:
    method = DINOConfig(out_dim=64, hidden_dim=32, bottleneck_dim=16, **options)
    return DINO(method, BACKBONE, ViewsConfig(global_size=32, local_size=16, local_crops=2), batch_size=BATCH)


def dinov2(**options) -> DINOv2:
    method = DINOv2Config(out_dim=64, hidden_dim=32, bottleneck_dim=16, **options)
    views = DINOv2ViewsConfig(
        global_size=32, local_size=16, local_crops=2, gram_size=48 if method.gram_weight else None
    )
    return DINOv2(method, BACKBONE, views, batch_size=BATCH)


def mae(**options) -> MAE:
    method = MAEConfig(decoder_dim=16, decoder_depth=2, decoder_heads=2, **options)
    return MAE(method, BACKBONE, MAEViewsConfig(global_size=32), batch_size=BATCH)


def sit(**options) -> SiT:
    return SiT(SiTConfig(**options), BACKBONE, SiTViewsConfig(global_size=32), batch_size=BATCH)


def supervised(**views) -> SupervisedViT:
    views = SupervisedViewsConfig(**{"global_size": 32, "randaugment": 2, "erase": 0.5} | views)
    return SupervisedViT(SupervisedConfig(ema=0.99), BACKBONE, views, batch_size=BATCH, classes=10)


METHODS = {
    "dino": dino,
    "dino koleo": lambda: dino(koleo_weight=0.1, freeze_last_layer_epochs=0),
    "dino in groups of crops": lambda: dino(crops_at_once=1),
    "dinov2": lambda: dinov2(gram_weight=1.0, koleo_weight=0.1),
    "dinov2 sinkhorn": lambda: dinov2(centering="sinkhorn_knopp", separate_head=True),
    "mae": lambda: mae(),
    "crossmae": lambda: mae(decoder="cross", predict_ratio=0.5),
    "sit blocks": lambda: sit(contrastive="nt_xent", corruption="blocks", color=0.5),
    "sit gmml": lambda: sit(contrastive="info_nce", corruption="gmml", reconstruct="corrupted"),
    "sit mask": lambda: sit(contrastive="none", corruption="mask", mask_rule="80/10/10", loss_weights="fixed"),
    "supervised": supervised,
    "supervised padded": lambda: supervised(crop="padded", randaugment_set="original"),
}
CASES = [*((name, False) for name in METHODS), ("dino", True), ("supervised padded", True)]
"""A method, and whether its images come one by one from the host, of different sizes."""


def batches(device: torch.device, ragged: bool) -> ResidentLoader | DataLoader:
    """An epoch of STEPS batches: of a resident set on `device`, or lists of images of different sizes on the host."""
    source = ShapesSource("train", BATCH * STEPS, (40, 40), 3, 0)
    if ragged:
        rows = [(source.load(index)[:, : 32 + index % 3], source.label(index), index) for index in range(len(source))]

        def collate(rows: list) -> tuple[list, torch.Tensor, torch.Tensor]:
            images, labels, indices = zip(*rows, strict=True)
            return list(images), torch.tensor(labels), torch.tensor(indices)

        return DataLoader(rows, BATCH, collate_fn=collate, pin_memory=device.type == "cuda")
    images = torch.stack([source.load(index) for index in range(len(source))]).to(device)
    return ResidentLoader(ResidentSource(source, images), EpochPlan(len(source), BATCH))


def train(module: Method, loader: ResidentLoader | DataLoader, callback: pl.Callback, **options) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**6,
        callbacks=[callback],
        **options,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == STEPS


class Copies(TorchDispatchMode):
    """Raises where a host tensor with axes comes to the device by a blocking copy, or unasked, and where a mask sets
    elements to others."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        host = [tuple(value.shape) for value in tensors if value.device.type == "cpu" and value.ndim]
        if host and any(value.device == META for value in tensors):
            assert (kwargs or {}).get("non_blocking"), f"{func} waits for host tensors {host}"
        if func.overloadpacket is torch.ops.aten.index_put_ and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            assert not args[2].ndim, "the mask of an index_put_ is counted"  # one value is a masked_fill
        return out


class Constants(TorchFunctionMode):
    """Raises where `torch.tensor` makes one on the device, which is a blocking copy; on `meta` nothing would be seen of
    it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        where = (kwargs or {}).get("device")
        assert func is not torch.tensor or where is None or torch.device(where) != META, (
            "torch.tensor waits for its copy to the device"
        )
        return func(*args, **(kwargs or {}))


class OnMeta(pl.Callback):
    """Moves a training to `meta` when it has begun, and back at its end: Lightning starts and ends with reading
    values."""

    def __init__(self) -> None:
        self.modes = contextlib.ExitStack()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)  # the optimizer's parameters stay the module's
        module.to(META)
        torch.__future__.set_swap_module_params_on_conversion(False)
        for group in trainer.optimizers[0].param_groups:
            group |= {"fused": False, "foreach": False}
        trainer.strategy._root_device = META
        self.modes.enter_context(Copies())
        self.modes.enter_context(Constants())

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.modes.close()
        trainer.strategy._root_device = torch.device("cpu")
        trainer.optimizers[0].state.clear()
        trainer.fit_loop.epoch_loop._results.clear()  # logged values
        trainer._logger_connector.reset_metrics()
        module.to_empty(device="cpu")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)


@pytest.fixture
def meta(monkeypatch) -> Iterator[OnMeta]:
    autocast = torch.autocast
    known = lambda kind, **options: contextlib.nullcontext() if kind == "meta" else autocast(kind, **options)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", known)
    monkeypatch.setattr(SupervisedViT, "check_labels", lambda *_: None)
    yield OnMeta()
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(("name", "ragged"), CASES)
def test_without_a_gpu(meta, name, ragged):
    train(METHODS[name](), batches(META if not ragged else torch.device("cpu"), ragged), meta, accelerator="cpu")


class Strict(pl.Callback):
    """Has torch raise where the host would wait for the GPU, once kernels are loaded and labels checked."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, number: int) -> None:
        if number == WARM:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_epoch_end(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "ragged"), CASES)
def test_on_a_gpu(name, ragged):
    train(METHODS[name](), batches(torch.device("cuda"), ragged), Strict(), accelerator="gpu", precision="bf16-mixed")
