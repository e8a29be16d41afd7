"""A backbone whose attention is known from the image, a tree of images, and readers of what the export wrote."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


class Backbone:
    """CLS attention of head i follows the mean over channels of patch pixels, to the power i + 1: known from the image
    alone."""

    def grid_of(self, images):
        return tuple(side // self.patch_size for side in images.shape[-2:])

    def __init__(self, patch_size=8, heads=2, prefix_tokens=1, mean=MEAN, std=STD):
        self.patch = (patch_size, patch_size)
        self.patch_size, self.heads, self.prefix_tokens, self.has_cls = (
            patch_size,
            heads,
            prefix_tokens,
            prefix_tokens > 0,
        )
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.batches = []

    def last_attention(self, images, rows):
        assert not torch.is_grad_enabled() and torch.get_num_threads() == 1 and rows == slice(0, 1)
        self.batches.append(tuple(images.shape))
        pixels = (images * self.std + self.mean).clamp(0, 1)
        patches = (
            torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), self.patch_size).flatten(1) + 0.01
        )  # (B, N)
        tokens = self.prefix_tokens + patches.shape[1]
        attention = torch.full((len(images), self.heads, 1, tokens), 1.0 / tokens)
        for head in range(self.heads):
            mass = patches ** (head + 1)
            attention[:, head, 0, self.prefix_tokens :] = 0.9 * mass / mass.sum(1, keepdim=True)
        return attention


def picture(height, width, seed=0, channels=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    pixels = pixels.repeat(4, 0).repeat(4, 1)[:height, :width]
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.fixture
def folder(tmp_path):
    """A tree: two sizes, non-square, gray, alpha, palette, a name twice with other extensions, a broken file, a
    note."""
    root = tmp_path / "images"
    (root / "cats" / "tabby").mkdir(parents=True)
    picture(32, 48, 1).save(root / "a.png")
    picture(40, 40, 2).save(root / "cats" / "same.png")
    picture(32, 48, 3).save(root / "cats" / "same.jpg")
    picture(30, 21, 4, channels=1).save(root / "cats" / "gray.png")
    rgba = picture(64, 24, 5).convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 200))
    rgba.save(root / "cats" / "tabby" / "alpha.png")
    picture(32, 48, 6).convert("P").save(root / "palette.gif")
    (root / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (root / "notes.txt").write_text("not an image")
    return root


SIZES = {
    "a": (32, 48),
    "cats/same.png": (40, 40),
    "cats/same.jpg": (32, 48),
    "cats/gray": (30, 21),
    "cats/tabby/alpha": (64, 24),
    "palette": (32, 48),
}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files_of(output):
    return sorted(os.path.relpath(path, output) for path in output.rglob("*") if path.is_file())


def sizes_in(root, sizes):
    root.mkdir()
    for i, size in enumerate(sizes):
        picture(*size, i).save(root / f"{i:03}.png")
    return root
