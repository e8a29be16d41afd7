"""Reading and writing backbones, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from vit_suite.config import BackboneConfig, ReadingConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone, save_backbone, weights_sha256


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(patch_size=4, dim=64, depth=2, heads=1, image_size=[16, 16], drop_path=0.1))


def same(first: Backbone, second: Backbone) -> bool:
    ours, theirs = first.vit.state_dict(), second.vit.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_round_trip_with_its_metadata(backbone, tmp_path):
    digest = save_backbone(backbone, tmp_path, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], method="dino", epoch=3)
    for path in (tmp_path, tmp_path / "backbone.safetensors"):
        loaded = load_backbone(path)
        assert same(loaded.backbone, backbone)
        assert loaded.mean == [0.1, 0.2, 0.3] and loaded.std == [0.4, 0.5, 0.6] and loaded.image_size == [16, 16]
        assert loaded.sha256 == digest == weights_sha256(backbone.vit.state_dict())
        assert loaded.meta["method"] == "dino" and loaded.meta["epoch"] == 3
        assert not loaded.backbone.training
    assert json.loads((tmp_path / "backbone.json").read_text())["sha256"] == digest
    assert {path.name for path in tmp_path.iterdir()} == {
        "backbone.safetensors",
        "backbone.json",
    }  # no temporary files left


def test_untrained_has_the_architecture_and_other_numbers(backbone, tmp_path):
    save_backbone(backbone, tmp_path, [0.5] * 3, [0.5] * 3)
    loaded = load_backbone(tmp_path)
    fresh = loaded.untrained(seed=1)
    assert fresh.backbone.cfg == loaded.backbone.cfg
    assert fresh.sha256 != loaded.sha256
    assert fresh.sha256 == loaded.untrained(seed=1).sha256  # repeatable


@pytest.mark.parametrize("wrap", ["plain", "teacher", "module."])
def test_dino_release_files(backbone, tmp_path, wrap):
    """A .pth as DINO publishes it: bare, or a training checkpoint with `teacher` and prefixes; the head is left out."""
    state = dict(backbone.vit.state_dict())
    if wrap == "teacher":
        teacher = {f"backbone.{name}": value for name, value in state.items()}
        state = {"student": {}, "teacher": teacher | {"head.mlp.0.weight": torch.zeros(1)}}
    elif wrap == "module.":
        state = {"teacher": {f"module.backbone.{name}": value for name, value in state.items()}}
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="does not say how many attention heads"):
        load_backbone(tmp_path / "dino.pth")
    loaded = load_backbone(tmp_path / "dino.pth", ReadingConfig(checkpoint_heads=1))
    assert same(loaded.backbone, backbone)
    assert (loaded.backbone.patch_size, loaded.backbone.depth, loaded.backbone.heads, loaded.image_size) == (
        4,
        2,
        1,
        [16, 16],
    )


def test_foreign_safetensors_with_timm_names(backbone, tmp_path):
    save_file(
        {name: tensor.contiguous() for name, tensor in backbone.vit.state_dict().items()}, tmp_path / "vit.safetensors"
    )
    loaded = load_backbone(tmp_path / "vit.safetensors", ReadingConfig(checkpoint_heads=1))
    assert same(loaded.backbone, backbone)


def write_bytes(content: bytes):
    return lambda path, backbone: path.write_bytes(content)


def truncated(path, backbone):
    torch.save(backbone.vit.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncated_safetensors(path, backbone):
    save_file({name: tensor.contiguous() for name, tensor in backbone.vit.state_dict().items()}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-10])


def code(path, backbone):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch '{path}.ran'",)

    torch.save({"state_dict": Evil()}, path)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.ckpt", write_bytes(b""), ["truncated", "0 bytes"]),
        ("b.pth", write_bytes(b"hello, not a checkpoint"), ["is no checkpoint", "hello"]),
        ("c.pth", truncated, ["is truncated: its end is missing"]),
        ("d.safetensors", truncated_safetensors, ["truncated or no safetensors"]),
        ("e.safetensors", write_bytes(b"x" * 100), ["truncated or no safetensors"]),
        ("f.pth", code, ["'posix.system'", "would run code", "owner can convert"]),
        ("g.pth", lambda path, _: torch.save(torch.zeros(3), path), ["Tensor", "not weights"]),
        ("h.pth", lambda path, _: torch.save({"conv1.weight": torch.zeros(3)}, path), ["holds no ViT", "cls_token"]),
        ("i.onnx", write_bytes(b"1"), [".ckpt", ".safetensors"]),
        (
            "j.pth",
            lambda path, _: torch.save(Backbone(BackboneConfig(dim=48, depth=1)).vit.state_dict(), path),
            ["heads", "48"],
        ),
    ],
)
def test_bad_files_get_one_clear_message(backbone, tmp_path, name, write, words):
    path = tmp_path / name
    write(path, backbone)
    with pytest.raises(UserError) as error:
        load_backbone(path)
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == [path]  # no code from the file ran


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_backbone(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="is no run directory"):
        load_backbone(tmp_path)


def test_other_architecture_counts_and_names_the_keys(backbone, tmp_path):
    save_backbone(backbone, tmp_path, [0.5] * 3, [0.5] * 3)
    from safetensors import safe_open

    path = tmp_path / "backbone.safetensors"
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["vit_suite"])
    description["backbone"]["depth"] = 3
    del state["norm.bias"]
    save_file(state, path, metadata={"vit_suite": json.dumps(description)})
    with pytest.raises(UserError, match=r"13 missing, first 'blocks\.2\.norm1\.weight'"):
        load_backbone(path)
    state["blocks.5.norm1.weight"] = torch.zeros(64)
    description["backbone"]["depth"] = 2
    save_file(state, path, metadata={"vit_suite": json.dumps(description)})
    with pytest.raises(
        UserError, match=r"1 missing, first 'norm\.bias'; 1 unexpected, first 'blocks\.5\.norm1\.weight'"
    ):
        load_backbone(path)


def test_write_atomically_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
