"""`vit-suite doctor`: findings on a training, on images or on a checkpoint, before a job waits a day in a queue."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from vit_suite.config import DoctorConfig, PretrainConfig, ProfileConfig
from vit_suite.data.files import split_folders
from vit_suite.data.listing import subfolders
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError, counted
from vit_suite.places import check_input
from vit_suite.training import checkup
from vit_suite.training.checkup import Finding
from vit_suite.training.parts import build_parts
from vit_suite.training.profile import measure
from vit_suite.training.start import adopt
from vit_suite.weights.checkpoint import load_backbone

LISTS = (".txt", ".csv", ".tsv")
"""Endings of lists of images."""


def run(cfg: DoctorConfig) -> None:
    """Print a line a finding. UserError when one is an error."""
    findings: list[Finding] = []
    examined = [look_at(target, cfg) for target in cfg.targets] if cfg.targets else [training(cfg)]
    for target in examined:
        for finding in target:
            findings.append(finding)
            print(f"{finding.level:<8} {finding}", flush=True)
    errors = [finding.what for finding in findings if finding.level == "error"]
    if errors:
        raise UserError(f"{len(errors)} of {len(findings)} findings are errors: {', '.join(errors)}.")
    doubtful = sum(finding.level == "warning" for finding in findings)
    print(f"{len(findings)} findings, {doubtful} warnings, no error")


def look_at(target: str, cfg: DoctorConfig) -> Iterator[Finding]:
    """Findings on one path: a checkpoint or run directory, else a folder or a list of images."""
    path = Path(target).expanduser()
    if os.path.lexists(path):
        check_input("targets", str(path))
    if path.is_file() and path.suffix.lower() in LISTS:
        yield from images("list", path, cfg)
    elif path.is_dir() and not (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        classes = bool(split_folders(path)) or len(subfolders(path)) > 1
        yield from images("folder" if classes else "flat", path, cfg)
    else:
        yield from checkpoint(target)


def checkpoint(target: str) -> Iterator[Finding]:
    """What a checkpoint holds, and whether its weights are numbers."""
    loaded = load_backbone(target)
    network = loaded.backbone
    weights = list(network.parameters())
    size = " x ".join(map(str, loaded.image_size))
    yield Finding(
        "ok",
        f"checkpoint '{target}'",
        f"{sum(weight.numel() for weight in weights) / 1e6:.1f} million weights, width {network.dim}, depth"
        f" {network.depth}, {network.heads} heads, patch {network.patch_size}, trained at {size} px, sha256"
        f" {loaded.sha256[:12]}.",
    )
    broken = sum(not bool(torch.isfinite(weight).all()) for weight in weights)
    if broken:
        said = f"{broken} of {len(weights)} tensors hold NaN or infinity."
        yield Finding("error", "weights", said, "Take an earlier checkpoint.")
    else:
        yield Finding("ok", "weights", f"all {len(weights)} tensors are finite.")


def images(name: str, path: Path, cfg: DoctorConfig) -> Iterator[Finding]:
    """What a folder or a list of images holds, read as data.name `name`."""
    title = f"{'list' if name == 'list' else 'folder'} '{path}'"
    options = replace(cfg.data, name=name, root=str(path), batch_size=1, resident=False)
    try:
        data = ImageDataModule(options, seed=cfg.run.seed)
        count = len(data.train_source)
    except UserError as error:
        yield Finding("error", title, str(error))
        return
    yield Finding("ok", title, f"{counted(count, 'image')} to train on, read as data.name {name}.")
    yield from checkup.of_images(data)


def training(cfg: DoctorConfig) -> Iterator[Finding]:
    """The parts of a training, its numbers, a sample of its images, and some of its steps."""
    plain = PretrainConfig(**{field.name: getattr(cfg, field.name) for field in fields(PretrainConfig)})
    if plain.start:
        plain = adopt(plain, load_backbone(plain.start))
    ranks = checkup.ranks_of(plain)
    with tempfile.TemporaryDirectory() as scratch:
        data, method, device, precision, _ = build_parts(plain, None)
        trained = sum(weight.numel() for weight in method.trained().parameters() if weight.requires_grad)
        network = f"{plain.method.name}, {trained / 1e6:.1f} million trained weights, {precision} on {device}."
        yield Finding("ok", "network", network)
        yield from checkup.of_run(plain, data, method, ranks)
        yield from checkup.of_logger(plain)
        yield from checkup.of_images(data)
        if cfg.steps:
            yield from steps(plain, cfg.steps, ranks, Path(scratch), data)


def steps(cfg: PretrainConfig, count: int, ranks: int, scratch: Path, data: ImageDataModule) -> Iterator[Finding]:
    """Time and memory of real steps with the share of the batch that one rank has."""
    local = max(1, cfg.data.batch_size // ranks)
    quiet = replace(cfg.trainer, nodes=1, devices="auto", strategy="ddp", progress=False)
    options = {field.name: getattr(cfg, field.name) for field in fields(PretrainConfig)}
    options |= {"trainer": quiet, "data": replace(cfg.data, batch_size=local), "start": None}
    recorder, _ = measure(ProfileConfig(**options, steps=count, warmup=1), scratch)
    found = checkup.Steps(recorder.seconds, local, recorder.peak_bytes, recorder.phases.device)
    yield from checkup.of_steps(cfg, data, found, ranks)
