"""Small files and the checks that several test files share."""

from __future__ import annotations

import io
import tarfile

import pytest
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split
from vit_suite.errors import UserError


def picture(path, color=(10, 20, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def config(name, root, **more):
    return DataConfig(name=name, root=str(root), **more)


def fails(cfg, *words, split="train"):
    with pytest.raises(UserError) as caught:
        open_split(cfg, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def tar(path, members, form=tarfile.USTAR_FORMAT):
    """Members are (name, bytes), or (name, color) for a PNG of 4 x 4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members:
            if isinstance(content, tuple):
                buffer = io.BytesIO()
                Image.new("RGB", (4, 4), content).save(buffer, "PNG")
                content = buffer.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path
