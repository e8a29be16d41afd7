"""Files of strangers: nothing runs, nothing large is built, and each fault has its own sentence."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vit_suite.config import BackboneConfig, ReadingConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone, save_backbone

HEADS = ReadingConfig(checkpoint_heads=2)


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(patch_size=4, dim=32, depth=2, heads=2, image_size=[16, 16], drop_path=0.0))


class Own:
    """A class that no checkpoint may name."""


def sentence(path: Path, how: ReadingConfig = HEADS) -> str:
    with pytest.raises(UserError) as error:
        load_backbone(path, how)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_namespace_of_main_dino_is_plain_data_and_tells_the_heads(backbone, tmp_path):
    """main_dino.py saves its argparse.Namespace; `arch` in it names the heads of vit_tiny, small and base."""
    state = {f"backbone.{name}": value for name, value in backbone.vit.state_dict().items()}
    args = argparse.Namespace(arch="vit_small", output_dir=Path("/runs"), momentum=np.float64(0.996))
    student = {f"module.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save({"student": student, "teacher": state, "args": args, "epoch": 7}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="32, which 6 heads do not divide"):
        load_backbone(tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", HEADS)
    assert torch.equal(loaded.backbone.vit.cls_token, backbone.vit.cls_token)  # the teacher's
    assert loaded.meta["epoch"] == 7 and loaded.meta["network"] == "teacher.backbone"
    student = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=2, checkpoint_branch="student"))
    assert not student.backbone.vit.cls_token.any()


def test_three_sentences_of_files_that_cannot_be_read(backbone, tmp_path):
    """A class, an old file, a truncated file."""
    state = backbone.vit.state_dict()
    torch.save({"model": state, "extra": Own()}, tmp_path / "class.pth")
    text = sentence(tmp_path / "class.pth")
    assert "Own'" in text and "owner can convert" in text and "torch.save(" in text
    torch.save({"model": state, "extra": Own()}, tmp_path / "class2.pth", _use_new_zipfile_serialization=False)
    assert "Own'" in sentence(tmp_path / "class2.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump({name: value.numpy() for name, value in state.items()}, file)
    assert "is an old file" in sentence(tmp_path / "plain.pth") or "numpy" in sentence(tmp_path / "plain.pth")
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({})
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert "old torch.save file" in sentence(tmp_path / "tar.pth")
    for zipped in (True, False):
        torch.save(state, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "whole.pth").read_bytes()
        for cut in (100, len(content) // 2, len(content) - 150):
            (tmp_path / "cut.pth").write_bytes(content[:cut])
            assert "is truncated" in sentence(tmp_path / "cut.pth"), (zipped, cut)


def test_an_old_torch_save_file_that_is_plain_loads(backbone, tmp_path):
    torch.save(backbone.vit.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_backbone(tmp_path / "old.pth", HEADS).report.complete


def test_a_file_that_unpacks_to_more_is_refused(backbone, tmp_path):
    torch.save(backbone.vit.state_dict(), tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as plain, zipfile.ZipFile(tmp_path / "b.pth", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry.filename))
        packed.writestr("archive/data/999", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    assert "unpacks to" in sentence(tmp_path / "b.pth")


def test_tensors_that_repeat_a_number_are_refused(backbone, tmp_path):
    state = dict(backbone.vit.state_dict())
    state["patch_embed.proj.weight"] = torch.zeros(1).expand(10**6, 3, 400, 400)
    torch.save(state, tmp_path / "a.pth")
    assert "larger than the file" in sentence(tmp_path / "a.pth")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(backbone, tmp_path, bad):
    with torch.no_grad():
        backbone.vit.blocks[1].mlp.fc1.weight[3, 2] = bad
    save_backbone(backbone, tmp_path, [0.5] * 3, [0.5] * 3)
    torch.save(backbone.vit.state_dict(), tmp_path / "a.pth")
    for path in (tmp_path, tmp_path / "a.pth"):
        assert "NaN or infinity in 1 of 30 tensors, first 'blocks.1.mlp.fc1.weight'" in sentence(path, HEADS)


def test_whole_numbers_are_no_weights(backbone, tmp_path):
    torch.save({name: value.to(torch.int8) for name, value in backbone.vit.state_dict().items()}, tmp_path / "a.pth")
    assert "int8" in sentence(tmp_path / "a.pth")


def test_half_precision_becomes_fp32(backbone, tmp_path):
    save_file({name: value.bfloat16() for name, value in backbone.vit.state_dict().items()}, tmp_path / "a.safetensors")
    loaded = load_backbone(tmp_path / "a.safetensors", HEADS)
    assert loaded.backbone.vit.cls_token.dtype == torch.float32


HOSTILE = {
    "depth": [10**9, 10_000, 0, -1, "two", [2], None, 2.5, True, {}],
    "dim": [10**9, 0, -32, [32], "32x"],
    "channels": [10**9, 0, -3, [3]],
    "image_size": [[10**6, 10**6], [0, 0], [16], 16, [-16, -16], [16, 16, 16], "big", [16, 32]],
    "heads": [10**9, 0, -2, 5, [2]],
    "mlp_ratio": [1e9, -1, 0, "nan", float("nan"), float("inf"), [4]],
    "registers": [10**9, -1, 1],
    "patch_size": [10**9, 0, 3, [4, 4, 4]],
    "positions": ["unknown", ["learned"], 5, None],
    "norm": ["other", 1],
    "name": [["vit"], "no_such_model", 5, None, "resnet50", "x" * 100_000],
    "drop_path": [2, -1, "x"],
    "norm_eps": [-1, 0, "a"],
    "surprise": [1],
}


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in HOSTILE.items() for value in values])
def test_hostile_metadata_costs_nothing(backbone, tmp_path, option, value):
    """Every dimension is compared with the tensors before a network is built."""
    save_backbone(backbone, tmp_path, [0.5] * 3, [0.5] * 3)
    path = tmp_path / "backbone.safetensors"
    description = json.loads((tmp_path / "backbone.json").read_text())
    description["backbone"][option] = value
    save_file(load_file(path), path, metadata={"vit_suite": json.dumps(description)})
    start = time.perf_counter()
    try:
        loaded = load_backbone(path)
    except UserError as error:
        assert len(str(error)) < 500 + len(str(path))
    else:  # a description that leaves a dimension to its default, which is then the right one
        assert loaded.report.complete and option in ("depth", "positions") and value in (None, True)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "own", [[], "text", {}, {"backbone": []}, {"backbone": None}, {"mean": [0.5]}, {"std": [0, 0, 0]}, {"mean": "abc"},
            {"image_size": [10**6, 10**6]}, {"std": [1, 1, float("nan")]}],
)  # fmt: skip
def test_descriptions_of_the_wrong_kind(backbone, tmp_path, own):
    save_backbone(backbone, tmp_path, [0.5] * 3, [0.5] * 3)
    path = tmp_path / "backbone.safetensors"
    if isinstance(own, dict) and own and "backbone" not in own:
        own = json.loads((tmp_path / "backbone.json").read_text()) | own
    save_file(load_file(path), path, metadata={"vit_suite": json.dumps(own)})
    sentence(path)


def test_deeply_nested_description(backbone, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(dict(backbone.vit.state_dict()), path, metadata={"vit_suite": "[" * 100_000})
    assert "no JSON" in sentence(path)
