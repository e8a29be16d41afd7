"""Whole training steps against DINO's train_one_epoch: our DINO module under a real Trainer, on the fixture's crops and
weights.

Covers at once what no single formula does: order of loss, center, clipping, last-layer freeze, optimizer and EMA;
per-step schedules;
weight decay of position embedding and CLS token; the teacher's fixed gain.
"""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from vit_suite.config import DINOConfig, OptimConfig, ViewsConfig
from vit_suite.methods.dino import DINO

from .golden import largest_error, load_golden, record, with_prefix
from .networks import golden_backbone_config

LOSS, CENTER, NORMS, FINAL_MOST, FINAL_ALL, KEY_BIAS = 1e-5, 1e-6, 1e-4, 1e-6, 5e-4, 5e-3


class Recorder(pl.Callback):
    """Keeps what the official loop logged, step by step."""

    def __init__(self):
        self.trace: dict[str, list] = {name: [] for name in ("loss", "lr", "wd", "center", "norms")}

    def on_after_backward(self, trainer, module):
        self.trace["norms"].append(torch.stack([p.grad.norm() for p in module.student.parameters() if p.requires_grad]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.trace["loss"].append(outputs["loss"])
        self.trace["lr"].append(groups[0]["lr"])
        self.trace["wd"].append(groups[0]["weight_decay"])
        self.trace["center"].append(module.center.clone())


def official_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our key names for the official ones."""
    return {name.replace("backbone.", "backbone.vit.", 1): tensor for name, tensor in state.items()}


def golden_module(hyper: dict, tensors: dict) -> DINO:
    method = DINOConfig(
        out_dim=hyper["out_dim"],
        hidden_dim=hyper["hidden"],
        bottleneck_dim=hyper["bottleneck"],
        norm_last_layer=hyper["norm_last_layer"],
        freeze_last_layer_epochs=hyper["freeze_last_layer"],
        warmup_teacher_temperature=hyper["warmup_teacher_temp"],
        teacher_temperature=hyper["teacher_temp"],
        warmup_teacher_temperature_epochs=hyper["warmup_teacher_temp_epochs"],
        momentum_teacher=hyper["momentum_teacher"],
    )
    views = ViewsConfig(global_size=hyper["g"], local_size=hyper["l"], local_crops=hyper["locals"])
    optim = OptimConfig(
        lr=hyper["lr"],
        min_lr=hyper["min_lr"],
        warmup_epochs=hyper["warmup_epochs"],
        weight_decay=hyper["weight_decay"],
        weight_decay_end=hyper["weight_decay_end"],
        clip=hyper["clip_grad"],
    )
    # The fixture's lr is the one AdamW sees: no scaling, so the global batch is said to be the reference 256.
    module = DINO(method, golden_backbone_config(hyper), views, optim, batch_size=256)
    module.student.load_state_dict(official_state(with_prefix(tensors, "init.")))
    module.teacher.load_state_dict(module.student.state_dict())
    return module


class Crops:
    """The fixture's crops of an epoch as a loader: ready-made views, globals first."""

    def __init__(self, hyper: dict, tensors: dict):
        self.hyper, self.tensors, self.epoch = hyper, tensors, 0

    def __len__(self):
        return self.hyper["niter"]

    def __iter__(self):
        first = self.epoch * len(self)
        self.epoch += 1
        for iteration in range(first, first + len(self)):
            yield (
                [*self.tensors["crops_g"][iteration], *self.tensors["crops_l"][iteration]],
                torch.zeros(self.hyper["batch"]),
            )


def key_bias_mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """True where the true gradient is zero and Adam turns rounding noise into steps: the key part of attn.qkv.bias."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    if name.endswith("attn.qkv.bias"):
        dim = len(tensor) // 3
        mask[dim : 2 * dim] = True
    return mask


@pytest.mark.parametrize("fixture", ["dino_train_trace", "dino_train_trace_norm_false"])
def test_train_trace(fixture, tmp_path):
    hyper, tensors = load_golden(fixture)
    module, recorder = golden_module(hyper, tensors), Recorder()
    with torch.no_grad():
        crops = next(iter(Crops(hyper, tensors)))[0]
        record(
            fixture,
            "student logits, step 0",
            largest_error(module.student(crops).flatten(0, 1), tensors["student_out_it0"]),
            1e-5,
        )
        record(
            fixture,
            "teacher logits, step 0",
            largest_error(module.teacher(crops[:2]).flatten(0, 1), tensors["teacher_out_it0"]),
            1e-5,
        )
    trainer = pl.Trainer(
        max_epochs=hyper["epochs"],
        accelerator="cpu",
        devices=1,
        precision="32-true",
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(module, Crops(hyper, tensors))
    trace = recorder.trace
    record(fixture, "lr (relative)", largest_error(trace["lr"], tensors["lr"], relative=True), 1e-15)
    record(fixture, "weight decay (relative)", largest_error(trace["wd"], tensors["wd"], relative=True), 1e-15)
    record(fixture, "loss", largest_error(torch.stack(trace["loss"]), tensors["loss"]), LOSS)
    record(fixture, "center", largest_error(torch.stack(trace["center"]), tensors["center"]), CENTER)
    record(fixture, "gradient norms", largest_error(torch.stack(trace["norms"]), tensors["grad_norms"]), NORMS)
    for network in ("student", "teacher"):
        ours = getattr(module, network).state_dict()
        golden = official_state(with_prefix(tensors, f"{network}_final."))
        assert set(ours) == set(golden)
        noise = {name: key_bias_mask(name, tensor) for name, tensor in golden.items()}
        errors = torch.cat([(ours[name] - golden[name])[~noise[name]].abs() for name in golden])
        record(fixture, f"{network} after training", float(errors.max()), FINAL_ALL)
        record(fixture, f"{network}, share off by over 1e-6", float((errors > FINAL_MOST).double().mean()), 1e-3)
        bias = torch.cat([(ours[name] - golden[name])[noise[name]].abs() for name in golden])
        record(fixture, f"{network}, key bias (rounding noise)", float(bias.max()), KEY_BIAS)
