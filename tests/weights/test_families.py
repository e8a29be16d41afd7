"""Released networks by the names of their weights: files with the true names load, and give what their own code gives.

Hugging Face models are made here with random weights, saved by transformers, loaded by names alone, and compared.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_suite.config import BackboneConfig, ReadingConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone
from vit_suite.weights.families import FAMILIES, check_periods, merge_qkv, recognize

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
MODELS = {  # model, options beside TINY
    "ViTModel": {"intermediate_size": 64},
    "ViTForImageClassification": {"intermediate_size": 64, "num_channels": 1},
    "ViTMAEModel": {"intermediate_size": 64},
    "ViTMAEForPreTraining": {
        "intermediate_size": 64,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    },
    "Dinov2Model": {"mlp_ratio": 2},
    "Dinov2Model swiglu": {"mlp_ratio": 3, "use_swiglu_ffn": True},
    "Dinov2WithRegistersModel": {"mlp_ratio": 2, "num_register_tokens": 3},
    "DINOv3ViTModel": {"intermediate_size": 64, "num_register_tokens": 3},
    "DINOv3ViTModel gated": {
        "intermediate_size": 48,
        "num_register_tokens": 2,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    },
}
ROW = {
    "ViTModel": "hf_vit",
    "ViTForImageClassification": "hf_vit",
    "ViTMAEModel": "hf_vitmae",
    "ViTMAEForPreTraining": "hf_vitmae",
    "Dinov2Model": "hf_dinov2",
    "Dinov2WithRegistersModel": "hf_dinov2_reg",
    "DINOv3ViTModel": "hf_dinov3",
}


def make_hf(name: str, folder, **options):
    """A random model of transformers, saved; parameters are of order 1, so that epsilon and order show."""
    transformers = pytest.importorskip("transformers", reason="the files are made with transformers (extra: test)")
    torch.manual_seed(0)
    cls = getattr(transformers, name.split()[0])
    model = cls(cls.config_class(**TINY, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position" in key and not parameter.requires_grad:
                continue
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def hf_tokens(model, images: torch.Tensor) -> torch.Tensor:
    """(B, T, D) after the final norm, of all tokens in place."""
    base = getattr(model, "vit", None) or model
    with torch.no_grad():
        if type(base).__name__ == "ViTMAEModel":  # masks patches in its own order: ask for none, and sort them
            base.config.mask_ratio = 0.0
            noise = torch.arange(16.0).expand(len(images), -1)
            return base(pixel_values=images, noise=noise).last_hidden_state
        return base(pixel_values=images).last_hidden_state


def our_tokens(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        tokens = backbone.tokens(images)
    return torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_folders_give_what_transformers_gives(tmp_path, name):
    model = make_hf(name, tmp_path, **MODELS[name])
    loaded = load_backbone(tmp_path)
    assert loaded.report.complete and loaded.family == ROW[name.split()[0]]
    images = torch.randn(2, loaded.backbone.cfg.channels, 16, 16)
    torch.testing.assert_close(our_tokens(loaded.backbone, images), hf_tokens(model, images), atol=1e-5, rtol=1e-5)
    assert loaded.mean == ([0.5] * loaded.backbone.cfg.channels if loaded.family == "hf_vit" else [0.485, 0.456, 0.406])


def test_a_lone_hugging_face_file_asks_for_the_heads(tmp_path):
    make_hf("ViTModel", tmp_path, intermediate_size=64)
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"--checkpoint_heads \(1, 2, 4 divide the width\)"):
        load_backbone(path)
    assert load_backbone(path, ReadingConfig(checkpoint_heads=4)).backbone.heads == 4
    with pytest.raises(UserError, match="32, which 5 heads do not divide"):
        load_backbone(path, ReadingConfig(checkpoint_heads=5))
    with pytest.raises(UserError, match="--checkpoint_heads is 2, but config.json of .* says 4"):
        load_backbone(tmp_path, ReadingConfig(checkpoint_heads=2))


def test_a_config_of_another_model_is_refused(tmp_path):
    make_hf("ViTModel", tmp_path, intermediate_size=64)
    config = tmp_path / "config.json"
    for kind, words in (("dinov2", "the keys are of ViT"), ("bert", "names the model type 'bert'")):
        config.write_text(config.read_text().replace('"vit"', f'"{kind}"'))
        with pytest.raises(UserError, match=words):
            load_backbone(tmp_path)
        config.write_text(config.read_text().replace(f'"{kind}"', '"vit"'))
    config.write_text(config.read_text().replace('"gelu"', '"gelu_new"'))
    with pytest.raises(UserError, match="activation 'gelu_new'"):
        load_backbone(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="config.json is no JSON"):
        load_backbone(tmp_path)


def test_names_of_transformers_version_5(tmp_path):
    """`torch.save(model.state_dict())` has the names that version 5 holds in memory."""
    model = make_hf("ViTModel", tmp_path / "hf", intermediate_size=64)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(our_tokens(loaded.backbone, images), hf_tokens(model, images), atol=1e-5, rtol=1e-5)


def test_folders_in_shards(tmp_path):
    model = make_hf("ViTModel", tmp_path / "whole", intermediate_size=64)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = load_backbone(tmp_path / "whole"), load_backbone(tmp_path / "parts")
    assert whole.sha256 == parts.sha256
    next((tmp_path / "parts").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="is incomplete"):
        load_backbone(tmp_path / "parts")


# -- golden numbers of the official code -------------------------------------------------------------------------------

GOLDEN = Path(os.environ.get("VIT_SUITE_GOLDEN") or Path(__file__).parents[1] / "golden")
OFFICIAL = {
    "dinov2_vit": "dinov2",
    "dinov2_vit_reg": "dinov2_reg",
    "dinov2_vit_swiglu": "dinov2",
    "dinov3_vit": "dinov3",
    "dinov3_vit_swiglu": "dinov3",
}


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_give_official_numbers(tmp_path, name, prefix):
    """A hub file, and a training checkpoint: CLS and patches at every size of the golden file."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["golden"])["hyperparameters"]
    state = {prefix + key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    if prefix:
        state |= {key.replace("teacher", "student"): torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": state} if prefix else state, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=options["heads"]))
    assert loaded.family == OFFICIAL[name] and loaded.report.complete
    for height, width in options["sizes"]:
        size = f"{height}x{width}"
        with torch.no_grad():
            tokens = loaded.backbone.tokens(tensors[f"x_{size}"])
            seen = loaded.backbone.last_attention(tensors[f"x_{size}"], slice(0, 1))[:, :, 0]
        torch.testing.assert_close(tokens.cls, tensors[f"cls_{size}"], atol=5e-5, rtol=0)
        torch.testing.assert_close(tokens.patches, tensors[f"patch_{size}"], atol=5e-5, rtol=0)
        torch.testing.assert_close(seen, tensors[f"attn_cls_last_{size}"], atol=1e-5, rtol=0)


def test_sit_of_version_1(tmp_path):
    """Official tokens: rotation, contrastive, patches; here contrastive, rotation, patches."""
    path = GOLDEN / "sit_v1.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["golden"])["hyperparameters"]
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.save({"model": state}, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=options["heads"]))
    assert loaded.family == "sit" and loaded.report.complete
    ours = our_tokens(loaded.backbone, tensors["x1_in"])
    theirs = tensors["features1"]
    torch.testing.assert_close(ours[:, 0], theirs[:, 1], atol=3e-5, rtol=0)
    torch.testing.assert_close(ours[:, 1], theirs[:, 0], atol=3e-5, rtol=0)
    torch.testing.assert_close(ours[:, 2:], theirs[:, 2:], atol=3e-5, rtol=0)


def test_a_bias_of_the_key_is_refused(tmp_path):
    """With rotary positions it would count, and timm's Eva has none; the official one is masked."""
    tensors = load_file(GOLDEN / "dinov3_vit.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    state = {key: value for key, value in state.items() if not key.endswith("bias_mask")}
    state["blocks.0.attn.qkv.bias"] = torch.ones_like(state["blocks.0.attn.qkv.bias"])
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="has a bias of the key that is not zero"):
        load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=3))


# -- the wrappings of files in timm's names ----------------------------------------------------------------------------


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(patch_size=4, dim=32, depth=2, heads=4, image_size=[16, 16], drop_path=0.0))


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def other(state: dict) -> dict:
    return {name: value + 1 for name, value in state.items()}


WRAPPED = {  # what a public training leaves -> (content, network that is taken)
    "dino": lambda s: {"student": under("module.backbone.", other(s)), "teacher": under("backbone.", s)},
    "dino ddp": lambda s: {"student": under("module.backbone.", other(s)), "teacher": under("module.backbone.", s)},
    "timm": lambda s: {"state_dict": other(s), "state_dict_ema": s, "epoch": 3, "arch": "custom"},
    "mae": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.weight": torch.zeros(3, 8)}},
    "solo-learn": lambda s: {
        "state_dict": under("backbone.", s)
        | under("momentum_backbone.", other(s))
        | {"classifier.weight": torch.zeros(10, 32), "projector.0.weight": torch.zeros(8, 32)},
        "pytorch-lightning_version": "2.0",
    },
    "lightly": lambda s: {
        "state_dict": under("student_backbone.vit.", other(s)) | under("teacher_backbone.vit.", s),
        "pytorch-lightning_version": "2.5",
    },
    "deit": lambda s: {"model": s | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}},
    "sit v3": lambda s: {"teacher": under("backbone.", s), "student": under("module.backbone.", other(s))},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_training_checkpoints_of_others(backbone, tmp_path, name):
    state = dict(backbone.vit.state_dict())
    torch.save(WRAPPED[name](state), tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4))
    ours = loaded.backbone.vit.state_dict()
    assert loaded.report.complete and all(torch.equal(ours[key], state[key]) for key in state)
    assert loaded.family == ("mae" if name == "mae" else "vit")


@pytest.mark.parametrize(
    "said", [{"args": argparse.Namespace(arch="vit_tiny")}, {"hyper_parameters": {"backbone": {"name": "vit_tiny"}}}]
)
def test_a_training_that_names_its_network_tells_the_heads(tmp_path, said):
    vit = Backbone(BackboneConfig(patch_size=4, dim=48, depth=1, heads=3, image_size=[8, 8], drop_path=0.0)).vit
    torch.save({"teacher": vit.state_dict(), **said}, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth")
    assert loaded.backbone.heads == 3 and loaded.meta["heads_from"] == "the training's arguments"


def test_published_sizes_need_no_option_and_width_192_does(tmp_path):
    """DINO's ViT-S is 384 wide, 12 deep and has 6 heads; 192 may have 3 (DeiT-Ti) or 12 (Gani et al. 2022)."""
    for dim, depth, heads in ((384, 12, 6), (192, 9, 12)):
        vit = Backbone(BackboneConfig(patch_size=16, dim=dim, depth=depth, heads=heads, image_size=[32, 32])).vit
        torch.save(vit.state_dict(), tmp_path / f"{dim}.pth")
    assert load_backbone(tmp_path / "384.pth").backbone.heads == 6
    with pytest.raises(UserError, match="does not say how many attention heads"):
        load_backbone(tmp_path / "192.pth")
    assert load_backbone(tmp_path / "192.pth", ReadingConfig(checkpoint_heads=12)).backbone.heads == 12


def test_two_networks_alike_have_to_be_chosen(backbone, tmp_path):
    state = dict(backbone.vit.state_dict())
    torch.save(under("left.", state) | under("right.", other(state)), tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds 2 networks, 'left', 'right': say which with --checkpoint_branch"):
        load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4))
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4, checkpoint_branch="right"))
    assert torch.equal(loaded.backbone.vit.cls_token, state["cls_token"] + 1)
    with pytest.raises(UserError, match="holds no network 'middle'"):
        load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4, checkpoint_branch="middle"))


def test_another_family_than_asked(backbone, tmp_path):
    torch.save(backbone.vit.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"--checkpoint_family is dinov2 .* but the keys of .* are of ViT in timm's"):
        load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4, checkpoint_family="dinov2"))
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4, checkpoint_family="vit"))
    assert loaded.report.complete


def test_a_missing_key_is_refused_unless_asked_for(backbone, tmp_path, caplog):
    state = dict(backbone.vit.state_dict())
    del state["blocks.1.mlp.fc2.bias"]
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"1 missing, first 'blocks\.1\.mlp\.fc2\.bias'"):
        load_backbone(tmp_path / "a.safetensors", ReadingConfig(checkpoint_heads=4))
    loaded = load_backbone(tmp_path / "a.safetensors", ReadingConfig(checkpoint_heads=4, allow_partial=True))
    assert not loaded.report.complete and len(loaded.report.matched) == len(state)
    assert "29 of 30 keys matched" in caplog.text and "UNTRAINED" in caplog.text


def test_an_unknown_part_is_refused(backbone, tmp_path):
    """A key that nobody explains is a part of a network that is another one."""
    state = dict(backbone.vit.state_dict()) | {"blocks.0.attn.q_norm.weight": torch.ones(8)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 unexpected, first 'blocks\.0\.attn\.q_norm\.weight'"):
        load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4))


def test_heads_and_decoders_are_reported(backbone, tmp_path):
    torch.save(dict(backbone.vit.state_dict()) | {"head.weight": torch.zeros(10, 32)}, tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", ReadingConfig(checkpoint_heads=4))
    assert loaded.report.left_out == ["head.weight"]
    assert str(loaded.report) == "30 of 30 keys matched, 1 left out (not of the backbone: head)"


# -- timm by name ------------------------------------------------------------------------------------------------------


def test_a_name_of_timm(monkeypatch):
    """The weights are random here, in place of the download; statistics, size and license are timm's."""
    made, asked = timm.create_model, []

    def create(name, **options):
        asked.append(options.pop("pretrained", False))
        return made(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    loaded = load_backbone("timm:vit_tiny_patch16_224")
    assert True in asked and loaded.family == "timm" and loaded.backbone.heads == 3
    assert loaded.mean == [0.5] * 3 and loaded.image_size == [224, 224] and loaded.license == "apache-2.0"
    with pytest.raises(UserError, match="--checkpoint_family is dinov2, but 'timm:vit_tiny_patch16_224' is timm's"):
        load_backbone("timm:vit_tiny_patch16_224", ReadingConfig(checkpoint_family="dinov2"))


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_row_is_an_option_and_alone_of_its_name():
    hint = ReadingConfig.__dataclass_fields__["checkpoint_family"].type
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for name in names:
        assert f'"{name}"' in hint or f"'{name}'" in hint or name in str(get_args(hint))


def test_a_family_with_more_parts_is_not_taken_for_one_with_fewer():
    dinov2 = ["patch_embed.proj.weight", "pos_embed", "cls_token", "mask_token", "blocks.0.norm1.weight"]
    assert recognize(dinov2, "patch_embed.proj.weight").name == "vit"
    assert recognize([*dinov2, "blocks.0.ls1.gamma"], "patch_embed.proj.weight").name == "dinov2"
    assert recognize([*dinov2, "blocks.0.ls1.gamma", "register_tokens"], "patch_embed.proj.weight").name == "dinov2_reg"
    assert recognize(["conv1.weight"], "patch_embed.proj.weight") is None


def test_query_key_and_value_are_stacked_in_this_order():
    state = {f"blocks.0.attn.{part}.weight": torch.full((2, 2), float(index)) for index, part in enumerate("qkv")}
    state |= {"blocks.0.attn.q.bias": torch.ones(2), "blocks.0.attn.v.bias": 3 * torch.ones(2)}  # DINOv3: no key bias
    merged = merge_qkv(state)
    assert merged["blocks.0.attn.qkv.weight"].flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert merged["blocks.0.attn.qkv.bias"].tolist() == [1, 1, 0, 0, 3, 3]
    del state["blocks.0.attn.k.weight"]
    with pytest.raises(UserError, match="has 2 of the weights"):
        merge_qkv(state)


def test_rotary_positions_of_another_base_are_refused():
    check_periods({"rope_embed.periods": 100 ** (torch.arange(4) / 4)})
    with pytest.raises(UserError, match="base 100"):
        check_periods({"rope_embed.periods": 10000 ** (torch.arange(4) / 4)})
