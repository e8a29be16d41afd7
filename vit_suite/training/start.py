"""A training that starts from a checkpoint. The checkpoint decides the architecture and the normalization of images."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path

import torch

from vit_suite.config import BackboneConfig, DataConfig, PretrainConfig
from vit_suite.config.limits import pair
from vit_suite.errors import UserError, counted
from vit_suite.methods.base import Method
from vit_suite.weights.checkpoint import LoadedBackbone

log = logging.getLogger("vit_suite")
UNSAID = {"mlp_ratio": 4.0, "registers": 0}
"""The value that None stands for in a checkpoint's options."""
FREE = ("drop_path", "checkpointing", "image_size", "channels", "lora_rank")
"""Options of the backbone that the checkpoint does not decide: free choices, and those that follow other options."""


def check_start(cfg: PretrainConfig) -> None:
    """UserError for options that need --start, if it is not given."""
    if cfg.start_heads and not cfg.start:
        raise UserError("start_heads needs --start: the checkpoint to take the heads from.")
    if cfg.backbone.lora_rank and not (cfg.start or cfg.backbone.pretrained):
        raise UserError("backbone.lora_rank freezes the backbone: give the weights it starts from with --start.")
    if cfg.backbone.lora_rank and cfg.trainer.strategy == "fsdp2":
        raise UserError("backbone.lora_rank does not go with trainer.strategy fsdp2: use ddp, its gradients are few.")


def adopt(cfg: PretrainConfig, loaded: LoadedBackbone) -> PretrainConfig:
    """`cfg` with the architecture, channels and statistics of `loaded`. Positions get the size of the views.

    Raises:
        UserError: a given option of the backbone contradicts the checkpoint.
    """
    theirs, source = loaded.backbone.cfg, loaded.source
    for name in (field.name for field in fields(BackboneConfig) if field.name not in FREE):
        given, had = getattr(cfg.backbone, name), getattr(theirs, name)
        had = UNSAID.get(name) if had is None else had
        if given != getattr(BackboneConfig, name) and given != had and name != "pretrained":
            raise UserError(
                f"backbone.{name} is {given}, but the backbone of '{source}' has {had}: leave it out, the checkpoint"
                " decides."
            )
    if cfg.backbone.pretrained:
        raise UserError(
            f"backbone.pretrained asks for timm's weights, but training starts from '{source}': leave it out."
        )
    channels = theirs.channels if cfg.data.channels == DataConfig.channels else cfg.data.channels
    if channels != theirs.channels:
        log.info(
            "%s takes %d channels, the data has %d: each gets the mean over channels of the patch embedding, x %d/%d",
            *(source, theirs.channels, channels, theirs.channels, channels),
        )
        loaded = replace(loaded, mean=averaged(loaded.mean, channels), std=averaged(loaded.std, channels))
    size = cfg.backbone.image_size or list(pair(cfg.views.global_size))
    own = {name: getattr(cfg.backbone, name) for name in ("drop_path", "checkpointing", "lora_rank")}
    backbone = replace(theirs, **own, image_size=size, pretrained=False)
    mean, std = cfg.data.mean or loaded.mean, cfg.data.std or loaded.std
    return replace(cfg, backbone=backbone, data=replace(cfg.data, channels=channels, mean=mean, std=std))


def origin_of(start: LoadedBackbone | None) -> dict[str, str]:
    """What the weights of a training say of those that it starts from; nothing for a start from random numbers."""
    return {} if start is None else {"start": start.source, "start_license": start.license}


def averaged(values: list[float], channels: int) -> list[float]:
    """The mean of the values, once for each of `channels`."""
    return [sum(values) / len(values)] * channels


def take_weights(method: Method, start: LoadedBackbone | None, checkpoint: Path | None) -> None:
    """Give the method the weights of `start`, unless the run resumes from `checkpoint`.

    Raises:
        UserError: the run resumes, and the head in `checkpoint` has other classes than the data.
    """
    if checkpoint is None:
        if start is not None:
            method.start_from(start.backbone)
        return
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    before, now = stored["hyper_parameters"].get("classes"), method.classes
    if before != now and before is not None and now is not None:
        names = next((f"; '{a}' was '{b}'" for a, b in zip(now, before, strict=False) if a != b), "")
        raise UserError(
            f"cannot resume: the head of '{checkpoint}' has {counted(len(before), 'class')} and the data"
            f" {len(now)}{names}. Give the data it was trained on, or --run.overwrite to start anew."
        )
