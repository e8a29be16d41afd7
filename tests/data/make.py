"""Small files and the checks that several test files share."""

from __future__ import annotations

import pytest
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split
from vit_suite.errors import UserError


def picture(path, colour=(10, 20, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def config(name, root, **more):
    return DataConfig(name=name, root=str(root), **more)


def fails(cfg, *words, split="train"):
    with pytest.raises(UserError) as caught:
        open_split(cfg, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
