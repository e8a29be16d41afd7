"""Small files and the checks that several test files share."""

from __future__ import annotations

import io
import tarfile

import pytest
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.registry import open_split
from vit_suite.data.resident import make_resident
from vit_suite.data.source import FileSource
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


def make_files(folder, count=23, bad=(), sizes=((8, 8),)):
    """Image i holds the value i everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", sizes[i % len(sizes)], (i, i, i)).save(folder / f"{i:03d}.png")
        if i in bad:
            (folder / f"{i:03d}.png").write_bytes(b"" if i % 2 else b"not an image")
    return FileSource(
        "set", "train", folder, [f"{i:03d}.png" for i in range(count)], 3, ["a", "b"], [i % 2 for i in range(count)]
    )


def resident(source):
    return make_resident(source, True, 1.0, Quarantine(limit=1.0))


def ids(batches):
    return [batch[2].tolist() for batch in batches]


def folder_set(root, count=12, size=(8, 8)):
    for split in ("train", "test"):
        for name in ("a", "b"):
            make_files(root / split / name, count, sizes=(size,))
    return root
