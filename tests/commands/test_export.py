"""`vit-suite export`: each format loads as its users load it and gives the same numbers; faults leave nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone, save_backbone
from vit_suite.weights.export import check
from vit_suite.weights.export.formats import FORMATS
from vit_suite.weights.export.graph import Traceable, resize_weights

ONE_ROW = {"image_size": [1, 64], "patch_size": [1, 16]}
SHAPES = ["--data.name", "shapes", "--data.test_length", "4"]


def random_backbone(**options) -> Backbone:
    """A tiny network with weights of order 1, so that a part in the wrong place shows."""
    torch.manual_seed(0)
    tiny = {"patch_size": 4, "dim": 32, "depth": 2, "heads": 2, "image_size": [16, 16], "drop_path": 0.0}
    backbone = Backbone(BackboneConfig(**{**tiny, **options})).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone


@pytest.fixture
def export(vit_suite, tmp_path):
    def run(backbone, *words):
        save_backbone(backbone, tmp_path / "in", [0.5] * backbone.cfg.channels, [0.25] * backbone.cfg.channels)
        return vit_suite("export", "--checkpoint", tmp_path / "in", "--output", tmp_path / "out", *SHAPES, *words)

    return run


def leftovers(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in"}


@pytest.mark.parametrize(
    "options",
    [{}, {"registers": 2}, {"pool": "mean"}, {"image_size": [16, 24], "channels": 1, "patch_size": [4, 6]}, ONE_ROW],
    ids=str,
)
@pytest.mark.parametrize("format", ["safetensors", "timm", "huggingface"])
def test_folders_load_as_their_users_load_them(export, tmp_path, format, options):
    if format == "huggingface":
        pytest.importorskip("transformers", reason="the folder is loaded with transformers (extra: test)")
    backbone = random_backbone(**options)
    said = export(backbone, "--format", format, "--outputs", "features", "patches")
    assert said.status == 0, said.err
    assert leftovers(tmp_path) == {"out"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "largest error" in card and str(tmp_path / "out") in card and "License" in card
    row = FORMATS[format]
    loaded = load_backbone(tmp_path / "in")
    height, width = backbone.cfg.image_size
    images = torch.randn(2, backbone.cfg.channels, height, width)
    answers = row.open(tmp_path / "out", loaded, check.ExportOptions(["features", "patches"]))(images)
    with torch.no_grad():
        torch.testing.assert_close(answers["features"], backbone(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answers["patches"], backbone.tokens(images).patches, atol=1e-5, rtol=1e-5)
    reads_back(tmp_path / "out", backbone)


def reads_back(folder, backbone) -> None:
    """`--checkpoint` takes the folder too, with mean, std and size."""
    back = load_backbone(folder)
    channels = backbone.cfg.channels
    assert (back.mean, back.std) == ([0.5] * channels, [0.25] * channels) and back.image_size == backbone.cfg.image_size
    images = torch.randn(2, channels, *backbone.cfg.image_size)
    with torch.no_grad():
        torch.testing.assert_close(back.backbone.tokens(images), backbone.tokens(images), atol=1e-5, rtol=1e-5)


ROPE = {"layer_scale": 1e-5, "registers": 3, "positions": "rope"}


@pytest.mark.parametrize(
    "options",
    [{"layer_scale": 1e-5}, {"mlp": "gelu_tanh"}, ROPE, ROPE | {"mlp": "swiglu", "mlp_ratio": 1.5}],
    ids=["scaled", "tanh", "rope", "gated"],
)
def test_timm_folders_of_newer_networks(export, tmp_path, options):
    backbone = random_backbone(**options)
    said = export(backbone, "--format", "timm", "--outputs", "features", "patches")
    assert said.status == 0, said.err
    reads_back(tmp_path / "out", backbone)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"].startswith("vit_")


KINDS = [
    ({"mlp": "gelu_tanh"}, "vit"),
    ({"registers": 2}, "dinov2_with_registers"),
    ({"layer_scale": 1e-5}, "dinov2"),
    ({"layer_scale": 1e-5, "registers": 3, "prefix_positions": False, "resize": "antialias"}, "dinov2_with_registers"),
    ({"layer_scale": 1e-5, "mlp": "swiglu", "mlp_ratio": 2.75}, "dinov2"),
    ({"layer_scale": 1e-5, "registers": 3, "positions": "rope"}, "dinov3_vit"),
    ({"layer_scale": 1e-5, "registers": 3, "positions": "rope", "mlp": "swiglu", "mlp_ratio": 1.5}, "dinov3_vit"),
]


def test_huggingface_classes(export, tmp_path):
    """ViTModel for a plain ViT, others by registers, LayerScale and rotary positions; transformers loads each."""
    pytest.importorskip("transformers", reason="the folder is loaded with transformers (extra: test)")
    for options, kind in KINDS:
        said = export(random_backbone(**options), "--format", "huggingface", "--outputs", "features", "patches")
        assert said.status == 0, (kind, said.err)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
        back = load_backbone(tmp_path / "out")  # and this suite reads its own folder by names
        assert back.report.complete and back.mean == [0.5] * 3
        assert back.backbone.cfg.mlp == options.get("mlp", "gelu")
        for path in (tmp_path / "out").iterdir():
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("onnx", {"registers": 1}),
        ("torch", {"registers": 1}),
        ("onnx", ROPE | {"mlp": "swiglu", "mlp_ratio": 1.5}),
        ("torch", ROPE),
    ],
    ids=["onnx", "torch", "rotary onnx", "rotary torch"],
)
def test_graphs_take_any_batch_and_size(export, tmp_path, format, kind):
    for name in FORMATS[format].needs:
        pytest.importorskip(name, reason="extra: export")
    backbone = random_backbone(**kind)
    said = export(backbone, "--format", format, "--outputs", "features", "patches", "attention")
    assert said.status == 0, said.err
    assert [line.split(":")[0] for line in said.out.splitlines()[:9]] == [
        f"{size} {name}" for size in ("16x16", "20x28", "8x12") for name in ("features", "patches", "attention")
    ]
    loaded = load_backbone(tmp_path / "in")
    options = check.ExportOptions(["features", "patches", "attention"])
    network = FORMATS[format].open(tmp_path / "out", loaded, options)
    for size in ((1, 16, 16), (3, 32, 20), (2, 8, 64)):
        images = torch.randn(size[0], 3, *size[1:])
        answers = network(images)
        with torch.no_grad():
            seen = backbone.last_attention(images, slice(0, 1))[:, :, 0, backbone.prefix_tokens :]
            torch.testing.assert_close(answers["features"], backbone(images), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(answers["attention"], seen, atol=1e-5, rtol=1e-5)


def test_no_graph_for_attention_that_it_does_not_know():
    backbone = random_backbone(**ROPE)
    Traceable(backbone, ["features"])
    backbone.vit.rope.normalize_coords = "max"
    with pytest.raises(UserError, match="blocks of the type RopeBlock cannot be exported as a graph"):
        Traceable(backbone, ["features"])


def test_positions_in_a_graph_are_those_of_interpolate():
    """The matrix of `resize_weights` is F.interpolate's bicubic rule with DINO's 0.1."""
    row = torch.randn(1, 1, 5, 1)
    for length in (1, 3, 5, 8, 17):
        for offset in (0.0, 0.1):
            scale = ((length + offset) / 5, 1.0)
            wanted = torch.nn.functional.interpolate(row, scale_factor=scale, mode="bicubic")
            if wanted.shape[2] != length:
                continue
            matrix = resize_weights(torch.arange(length).float(), 5, torch.tensor(offset))
            torch.testing.assert_close(matrix @ row[0, 0], wanted[0, 0], atol=2e-5, rtol=1e-5)


def test_a_graph_of_few_patches(export, tmp_path):
    """The check does not ask it for images of one patch, which no graph takes. Patches of two sides."""
    said = export(random_backbone(image_size=[8, 16], patch_size=[4, 8]), "--format", "torch")
    assert said.status == 0, said.err


def test_a_full_disk_says_what_to_do_and_leaves_nothing(export, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setitem(FORMATS, "safetensors", replace(FORMATS["safetensors"], write=full))
    monkeypatch.chdir(tmp_path)
    said = export(random_backbone())
    assert said.status == 1 and "Make room and give the same command again" in said.err, said.err
    assert leftovers(tmp_path) == {"vit-suite-error.log"}


def test_a_folder_that_differs_is_not_kept(export, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", -1.0)
    said = export(random_backbone(), "--format", "timm")
    assert said.status == 2 and "nothing was kept" in said.err and leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ({"norm": "post"}, ["--format", "timm"], "LayerNorm after the sum"),
        ({"norm": "post"}, ["--format", "huggingface"], "LayerNorm after the sum"),
        ({"causal": True}, ["--format", "torch"], "causal order"),
        ({"class_token": False, "pool": "mean"}, ["--format", "huggingface"], "no CLS token"),
        ({"class_token": False, "pool": "mean"}, ["--format", "torch", "--outputs", "attention"], "needs a CLS token"),
        ({}, ["--format", "timm", "--outputs", "attention"], "--outputs attention is for onnx, torch and safetensors"),
        ({}, ["--format", "onnx", "--opset", "11"], "ONNX operator sets 18 to"),
        ({"image_size": [4, 16]}, ["--format", "torch"], "a network of 1 x 4 patches cannot be exported as a graph"),
        ({"mlp": "swiglu"}, ["--format", "timm"], "cannot name a SwiGLU"),
        ({}, ["--format", "onxn"], "Did you mean 'onnx'?"),
        ({}, ["--checkpoint_family", "dinov2"], "was written by vit-suite"),
    ],
)
def test_requests_that_cannot_be(export, tmp_path, options, words, message):
    said = export(random_backbone(**options), *words)
    assert said.status == 2 and message in said.err, said.err
    assert len(said.err.splitlines()) == 1 and leftovers(tmp_path) == set()


def test_a_network_of_channels_that_generated_images_have_not(vit_suite, tmp_path):
    """It needs images that the user names."""
    save_backbone(random_backbone(channels=6), tmp_path / "in", [0.5] * 6, [0.25] * 6)
    said = vit_suite("export", "--checkpoint", tmp_path / "in", "--output", tmp_path / "out")
    assert said.status == 2 and "6 channels, and generated ones have 1 or 3: give some with --images" in said.err
    assert leftovers(tmp_path) == set()


def test_a_folder_that_is_not_empty_stays_as_it_is(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    said = export(random_backbone())
    assert said.status == 2 and "is not empty" in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
