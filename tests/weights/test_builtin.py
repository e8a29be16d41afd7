"""`builtin:NAME`: backbones that come with the package."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite.attention.localize import Localizer
from vit_suite.attention.localized import localize
from vit_suite.config import BackboneConfig
from vit_suite.data.decode import decode
from vit_suite.data.shapes import ShapesSource
from vit_suite.data.truth import source_truths
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights import checkpoint
from vit_suite.weights.checkpoint import BUILTIN_FOLDER, load_backbone, save_backbone


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


def test_the_backbone_that_comes_along_is_what_its_json_says():
    loaded = load_backbone("builtin:shapes")
    about = json.loads((BUILTIN_FOLDER / "shapes.json").read_text())
    assert loaded.sha256 == about["sha256"] and loaded.image_size == [48, 48]
    assert (BUILTIN_FOLDER / "shapes.safetensors").stat().st_size < 4 * 2**20
    assert about["config"]["data"]["name"] == "shapes" and about["command"].startswith("vit-suite pretrain")
    knn, masks = about["scores"]["knn"], about["scores"]["masks"]
    assert knn["backbone"]["k20"]["top1"] > knn["raw pixels"]["k20"]["top1"] + 10
    assert masks["backbone"]["fixed head"]["jaccard"] > masks["center_box"]["jaccard"] + 5


def test_it_finds_the_objects_of_images_it_has_not_seen():
    loaded = load_backbone("builtin:shapes")
    source = ShapesSource("test", 40, (48, 48), seed=7)
    found = localize(Localizer(source, source_truths(source), ("attention",), (0.9,)), {"it": loaded}, seed=0)
    assert found.scores["it"]["fixed head"].overlap > found.baselines.center_box.overlap + 5


def test_transform_takes_pillow_images_as_their_files_are_read(tmp_path):
    loaded = load_backbone("builtin:shapes")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 4), np.uint8)
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.jpg"]
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., :3])]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    opened = [Image.open(file) for file in files]
    wanted = loaded.transform([torch.from_numpy(decode(file)) for file in files])
    assert torch.equal(loaded.transform(opened), wanted)
    assert torch.equal(loaded.transform(Image.open(files[0])), wanted[:1])
    with pytest.raises(UserError, match="an image is a str; views take tensors"):
        loaded.transform([str(files[0])])
