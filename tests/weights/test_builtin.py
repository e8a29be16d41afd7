"""`builtin:NAME`: backbones that come with the package."""

import shutil

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights import checkpoint
from vit_suite.weights.checkpoint import load_backbone, save_backbone


def test_a_name_is_a_file_of_the_package(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(name="vit", patch_size=4, dim=32, depth=1, heads=2, image_size=[16, 16]))
    digest = save_backbone(backbone, tmp_path, [0.5] * 3, [0.25] * 3, method="dino")
    shutil.copy(tmp_path / "backbone.safetensors", tmp_path / "small.safetensors")
    monkeypatch.setattr(checkpoint, "BUILTIN_FOLDER", tmp_path)
    loaded = load_backbone("builtin:small")
    assert (loaded.sha256, loaded.source, loaded.mean) == (digest, "builtin:small", [0.5] * 3)
    with pytest.raises(UserError, match=r"no backbone of that name. Did you mean 'builtin:small'\?"):
        load_backbone("builtin:smal")
    with pytest.raises(UserError, match="builtin:NAME"):
        load_backbone(tmp_path / "nothing.ckpt")
