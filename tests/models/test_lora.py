"""LoRA: a start that changes nothing, pairs that learn, a base that stays, and a plain network at the end."""

from __future__ import annotations

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.methods.start import copy_backbone
from vit_suite.models.backbone import Backbone
from vit_suite.models.ema import copy_weights, ema_update
from vit_suite.models.lora import linear_layers, merged, trained_share
from vit_suite.weights.checkpoint import load_backbone, save_backbone

TINY = {"patch_size": 4, "dim": 32, "depth": 2, "heads": 2, "image_size": [16, 16], "drop_path": 0.0}


@pytest.fixture
def base() -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**TINY)).eval()


@pytest.fixture
def lora(base) -> Backbone:
    network = Backbone(BackboneConfig(**TINY, lora_rank=3))
    copy_backbone(network, base)
    return network.eval()


def stir(network: Backbone) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_a_start_changes_nothing_and_only_pairs_learn(base, lora):
    images = torch.randn(2, 3, 24, 20)
    assert torch.equal(lora(images), base(images))
    learning = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 4 * 2 and all(".parametrizations.weight.0." in name for name in learning)
    assert set(linear_layers(lora.vit)) == {
        f"{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert 0.05 < trained_share(lora) < 0.25
    lora(images).square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in lora.parameters())


def test_merging_gives_a_plain_network(lora, tmp_path):
    stir(lora)
    images = torch.randn(2, 3, 16, 16)
    plain = merged(lora)
    assert plain.cfg.lora_rank == 0 and not any("parametrizations" in name for name in plain.state_dict())
    assert any("parametrizations" in name for name in lora.state_dict())  # which stays as it was
    with torch.no_grad():
        torch.testing.assert_close(plain(images), lora(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(plain.tokens(images).patches, lora.tokens(images).patches, atol=1e-5, rtol=0)
        save_backbone(lora, tmp_path, [0.5] * 3, [0.5] * 3)
        loaded = load_backbone(tmp_path)
        assert loaded.report.complete and loaded.backbone.cfg.lora_rank == 0
        torch.testing.assert_close(loaded.backbone(images), lora(images), atol=1e-5, rtol=0)


def test_the_average_moves_pairs_alone(lora):
    teacher = Backbone(lora.cfg)
    copy_weights(teacher, lora)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    stir(lora)
    ema_update(teacher, lora, 0.9)
    for name, value in teacher.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * lora.state_dict()[name]
        if ".parametrizations.weight.0." in name:
            torch.testing.assert_close(value, moved)
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])


def test_other_channels_take_the_mean_of_the_patch_embedding(base):
    """An image whose channels are all alike gives the same tokens with 5 channels as with 3."""
    wide = Backbone(BackboneConfig(**TINY, channels=5)).eval()
    copy_backbone(wide, base)
    gray = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            wide(gray.expand(-1, 5, -1, -1)), base(gray.expand(-1, 3, -1, -1)), atol=1e-5, rtol=0
        )
