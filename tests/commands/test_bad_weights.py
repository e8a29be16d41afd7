"""Weights that cannot be used, through the command line: one sentence that names the file once, status 2, nothing left.

What each file is refused for is tested in tests/weights; here is that a user sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.commands.conftest import save_pictures, words
from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone

HEADS = ["--checkpoint_heads", "2"]


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tiny = BackboneConfig(patch_size=8, dim=32, depth=1, heads=2, image_size=[16, 16], drop_path=0.0)
    return dict(Backbone(tiny).vit.state_dict())


def changed(name, change):
    """A network in the names of DINO with one tensor that is not as it should be."""
    return lambda path: torch.save(state() | {name: change(state()[name])}, path)


def truncated(path):
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-300])


def sound(path):
    torch.save(state(), path)


NORM, QKV = "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"
FAULTS = {
    "another family": (sound, [*HEADS, "--checkpoint_family", "dinov2"], "are of ViT in timm's names"),
    "our family": (sound, [*HEADS, "--checkpoint_family", "vit-suite"], "holds no description of this suite"),
    "truncated": (truncated, HEADS, "is truncated: its end is missing"),
    "empty": (lambda path: path.write_bytes(b""), HEADS, "is truncated: it holds 0 bytes"),
    "text": (
        lambda path: path.write_text("learning_rate: 0.1\n" * 50),
        HEADS,
        "is no checkpoint but text, which begins with 'learning_rate: 0.1 learning_rate: 0.1 le'",
    ),
    "binary": (lambda path: path.write_bytes(bytes(range(1, 129))), HEADS, r"it begins with b'\x01\x02"),
    "NaN": (changed(NORM, lambda x: x * np.nan), HEADS, f"NaN or infinity in 1 of 18 tensors, first '{NORM}'"),
    "int64": (changed(NORM, torch.Tensor.long), HEADS, f"'{NORM}' is int64; expected weights of 16, 32 or 64-bit"),
    "shape": (changed(QKV, lambda x: x[:-1]), HEADS, f"'{QKV}' ((95, 32) in the file, (96, 32) here)"),
    "heads not said": (sound, [], "does not say how many attention heads"),
    "heads that do not divide": (sound, ["--checkpoint_heads", "5"], "32, which 5 heads do not divide"),
}
"""What is wrong -> (writes the file, options, part of the sentence)."""


@pytest.fixture
def refused(vit_suite, tmp_path):
    def call(command, *arguments, part):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        said = vit_suite(command, *arguments)
        assert said.status == 2, said
        assert said.err.startswith("vit-suite: error: ") and said.err.count("\n") == 1 and part in said.err, said.err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return said.err

    return call


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(refused, tmp_path, fault):
    """By `embed`, which reads a checkpoint as every other command does, and by `pretrain --start`."""
    make, options, part = FAULTS[fault]
    path, images = tmp_path / "weights.pth", tmp_path / "images"
    make(path)
    save_pictures(images, 2)
    answers = [
        refused(
            "embed", "--checkpoint", path, "--images", images, "--output", tmp_path / "out.npz", *options, part=part
        ),
        refused("pretrain", *words(start=path, run__output=tmp_path / "run"), *options, part=part),
    ]
    assert all(said.count(str(path)) == 1 for said in answers), answers


def test_text_in_a_safetensors_file(refused, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("not found\n" * 50)
    refused("export", "--checkpoint", path, "--output", tmp_path / "out", part="truncated or no safetensors file")
