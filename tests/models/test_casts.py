"""Weights that are cast together give what autocast gives, and leave nothing behind."""

import contextlib
import copy

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone
from vit_suite.models.casts import cast_together, linear_tensors

SMALL = {"patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "image_size": [16, 16], "drop_path": 0.0}


def outputs_and_gradients(backbone: Backbone, together: bool, monkeypatch) -> list[torch.Tensor]:
    backbone = copy.deepcopy(backbone)
    run = Backbone._run_cast if together else lambda self, index, function, x, **kwargs: function(x, **kwargs)
    monkeypatch.setattr(Backbone, "_run", lambda self, *args, **kwargs: run(self, *args, **kwargs))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        output = backbone(images)
    output.float().square().sum().backward()
    names = [name for layer in backbone.vit.modules() for name in layer.__dict__ if name in ("weight", "bias")]
    assert not names  # of the parameters alone
    return [output, *(parameter.grad for parameter in backbone.parameters())]


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"positions": "rope", "mlp": "swiglu"}])
def test_same_bits_as_autocast(more, monkeypatch):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(**SMALL, **more))
    found = (outputs_and_gradients(backbone, together, monkeypatch) for together in (True, False))
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_compiled_blocks_keep_their_weights(monkeypatch):
    backbone = Backbone(BackboneConfig(**SMALL))
    used: list[object] = []
    monkeypatch.setattr(
        "vit_suite.models.backbone.cast_together", lambda *_: used.append(1) or contextlib.nullcontext()
    )
    for block in list(backbone.vit.blocks)[:1]:
        block._compiled_call_impl = block._call_impl
    for index in range(2):
        backbone._run_cast(index, backbone.vit.blocks[index], torch.randn(1, 5, 32))
    assert len(used) == 1


def test_sharded_weights_are_left_to_fsdp(monkeypatch):
    layer = torch.nn.Linear(4, 4)
    monkeypatch.setattr("vit_suite.models.casts.distributed.is_sharded", lambda tensor: tensor.ndim == 2)
    with torch.autocast("cpu", torch.bfloat16), cast_together(linear_tensors(layer), "cpu"):
        assert layer.weight.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16


def test_without_autocast_the_weights_stay():
    layer = torch.nn.Linear(4, 4)
    with cast_together(linear_tensors(layer), "cpu"):
        assert layer.weight is dict(layer.named_parameters())["weight"]
    with torch.autocast("cpu", torch.bfloat16), cast_together(linear_tensors(layer), "cpu"):
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
