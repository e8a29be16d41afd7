"""Pictures of the attention during training: of the same images every few epochs, and at the end all epochs side by
side.

Axes: n images, h heads, S side of a tile in pixels.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw

from vit_suite.attention import render
from vit_suite.attention.maps import attention_maps, mass_mask, mean_map, upsample
from vit_suite.config.limits import pair
from vit_suite.data.source import ImageSource
from vit_suite.files import write_atomically
from vit_suite.hardware import Precision, autocast
from vit_suite.training.scores import due, show
from vit_suite.views.evaluate import eval_view
from vit_suite.views.resample import Size

log = logging.getLogger("vit_suite")

SIDE = 96
"""Smallest length of a tile's longer side, in pixels. Smaller views are enlarged by a whole factor, pixel by pixel."""
GAP, HEADER = 2, 14
"""Pixels between two tiles, and above the tiles for the titles (one line of PIL's font)."""
THRESHOLD = 0.6
"""Share of the attention mass inside an outline (DINO's `visualize_attention.py`)."""
BRIGHTEST = 4.0
"""The brightest color stands for this many times the mean of a map. If each map were stretched to its own range, the
noise of an untrained network would look like structure."""
COLUMNS = 16
"""Most epochs in the strip. Of a longer run it shows evenly spaced epochs."""
STRIP = "epochs.png"


class AttentionSnapshots(pl.Callback):
    """Writes `FOLDER/epoch_NNNN.png` (epoch 0 is before training), and at the end `FOLDER/epochs.png`; for loggers too.

    Each image of `source` that decodes has a row: the image, and overlays of the mean over heads and of each head. The
    strip `epochs.png` shows the image and the mean map of each epoch, also of a run that was resumed. For a backbone
    without a CLS token a message is logged once, and nothing is drawn.
    """

    def __init__(
        self, folder: str | Path, source: ImageSource, image_size: Size, every_epochs: int, precision: Precision
    ):
        self.folder, self.image_size = Path(folder), pair(image_size)
        self.every_epochs, self.precision = every_epochs, precision
        self.images = [image for image in (source.get(index) for index in range(len(source))) if image is not None]
        self.factor = max(1, -(-SIDE // max(self.image_size)))
        self.blind = not self.images

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if not self.blind and not module.evaluation_backbone().has_cls:
            self.blind = True
            log.info(
                "snapshots.every_epochs: this backbone has no CLS token, so no attention is drawn; see `vit-suite"
                " localize` instead"
            )
        if trainer.global_step == 0:
            self._draw(trainer, module, 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if due(trainer, self.every_epochs):
            self._draw(trainer, module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero and not self.blind and (found := self.drawn(trainer.current_epoch)):
            strip = side_by_side(found, self.image_size[1] * self.factor + GAP)
            _save(strip, self.folder / STRIP)
            show(trainer, "attention/epochs", strip)
            log.info("attention of %d images over %d epochs: %s", len(self.images), max(found), self.folder / STRIP)

    def drawn(self, last: int) -> dict[int, Path]:
        """Epoch -> its picture, up to epoch `last`. Pictures of later epochs may be there, if the run was resumed from
        an earlier epoch."""
        named = (
            (re.fullmatch(r"epoch_(\d+)\.png", path.name), path) for path in sorted(self.folder.glob("epoch_*.png"))
        )
        found = {int(match[1]): path for match, path in named if match}
        return {epoch: found[epoch] for epoch in sorted(found) if epoch <= last}

    def _draw(self, trainer: pl.Trainer, module: Any, epoch: int) -> None:
        if self.blind:
            return
        module = module.whole("evaluation_backbone")
        if not trainer.is_global_zero:
            return
        sheet = self.sheet(module)
        _save(sheet, self.folder / f"epoch_{epoch:04d}.png")
        show(trainer, "attention", sheet)

    @torch.no_grad()
    def sheet(self, module: Any) -> Image.Image:
        """A row for each image: the image, the mean over heads, head 0, head 1, ..."""
        images = [image.to(module.device) for image in self.images]
        with autocast(self.precision, module.device):
            views = eval_view(images, self.image_size, module.mean, module.std)
            maps = attention_maps(module.evaluation_backbone(), views).cpu()  # (n, h, gh, gw)
        channels = len(module.mean)
        shown = (
            (eval_view(images, self.image_size, [0.0] * channels, [1.0] * channels) * 255).round().byte().cpu().numpy()
        )
        maps = torch.cat([mean_map(maps)[:, None], maps], dim=1)
        factor, (height, width) = self.factor, self.image_size
        size = height * factor, width * factor
        rows = []
        for picture, small in zip(shown, maps, strict=True):
            picture = render.as_picture(picture).repeat(factor, 0).repeat(factor, 1)
            even = small.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(small.dtype).tiny)
            level = render.levels(upsample(small / even, size).numpy(), (0, BRIGHTEST))
            mask = upsample(mass_mask(small, THRESHOLD), size).numpy()
            rows.append([picture, *render.overlay(picture, level, mask)])
        return tiled(rows, ["image", "mean", *(f"head {i}" for i in range(maps.shape[1] - 1))])


def tiled(rows: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """Tiles, uint8 (H, W, 3), in rows and columns, with a title above each column."""
    width = rows[0][0].shape[1]
    framed = [[np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for tile in row] for row in rows]
    return titled(np.concatenate([np.concatenate(row, axis=1) for row in framed]), titles, width + GAP)


def titled(body: np.ndarray, titles: list[str], step: int) -> Image.Image:
    """The picture `body`, uint8 (H, W, 3), with a title above each of its columns of `step` pixels."""
    image = Image.fromarray(np.pad(body, ((HEADER, 0), (0, 0), (0, 0)), constant_values=255))
    pen = ImageDraw.Draw(image)
    for place, title in enumerate(titles):
        pen.text((place * step + 2, 1), title, fill=(0, 0, 0))
    return image


def side_by_side(pictures: dict[int, Path], step: int) -> Image.Image:
    """The strip: the column of images, then the column of mean maps of each epoch.

    Args:
        pictures: epoch -> the file of its sheet. Sheets of another size than the last one, which come from other
            options, are left out.
        step: width of a column in pixels.
    """
    sheets = {epoch: np.asarray(Image.open(path).convert("RGB"))[HEADER:] for epoch, path in pictures.items()}
    sheets = {epoch: sheet for epoch, sheet in sheets.items() if sheet.shape == sheets[max(sheets)].shape}
    epochs = [sorted(sheets)[round(place)] for place in np.linspace(0, len(sheets) - 1, min(COLUMNS, len(sheets)))]
    columns = [sheets[epochs[-1]][:, :step], *(sheets[epoch][:, step : 2 * step] for epoch in epochs)]
    return titled(np.concatenate(columns, axis=1), ["image", *(f"epoch {epoch}" for epoch in epochs)], step)


def _save(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
