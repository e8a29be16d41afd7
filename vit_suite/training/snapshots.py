"""Attention during training: the same images every few epochs, and all epochs side by side at the end.

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
from vit_suite.data.source import ImageSource
from vit_suite.files import write_atomically
from vit_suite.hardware import Precision, autocast
from vit_suite.training.scores import due, show
from vit_suite.views.evaluate import eval_view

log = logging.getLogger("vit_suite")

SIDE = 96
"""Least side in pixels of a tile; smaller views are enlarged by a whole factor, pixel by pixel."""
GAP, HEADER = 2, 14
THRESHOLD = 0.6
"""Share of the mass inside an outline."""
BRIGHTEST = 4.0
"""Times the mean of a map that have the brightest color. Each map stretched to its own range, even the noise of an
untrained network would look like something."""
COLUMNS = 16
"""Most epochs in the strip; of more, evenly spaced ones."""
STRIP = "epochs.png"


class AttentionSnapshots(pl.Callback):
    """Writes `FOLDER/epoch_NNNN.png`, before training as epoch 0, and at the end `FOLDER/epochs.png`; loggers get both.

    A row for each image: the image, overlays of the mean over heads and of each head. The strip has the image and the
    mean of each
    epoch, of runs that were resumed too. Drawn are the images of `source` that decode, as the evaluation view shows
    them. A backbone without a CLS token is said once, and nothing is drawn.
    """

    def __init__(
        self, folder: str | Path, source: ImageSource, image_size: int, every_epochs: int, precision: Precision
    ):
        self.folder, self.image_size, self.every_epochs, self.precision = (
            Path(folder),
            image_size,
            every_epochs,
            precision,
        )
        self.images = [image for image in (source.get(index) for index in range(len(source))) if image is not None]
        self.side = image_size * max(1, -(-SIDE // image_size))
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
            strip = side_by_side(found, self.side + GAP)
            _save(strip, self.folder / STRIP)
            show(trainer, "attention/epochs", strip)
            log.info("attention of %d images over %d epochs: %s", len(self.images), max(found), self.folder / STRIP)

    def drawn(self, last: int) -> dict[int, Path]:
        """Epoch -> its picture, up to epoch `last`: a run that is resumed from an earlier one leaves later ones
        behind."""
        named = (
            (re.fullmatch(r"epoch_(\d+)\.png", path.name), path) for path in sorted(self.folder.glob("epoch_*.png"))
        )
        found = {int(match[1]): path for match, path in named if match}
        return {epoch: found[epoch] for epoch in sorted(found) if epoch <= last}

    def _draw(self, trainer: pl.Trainer, module: Any, epoch: int) -> None:
        if self.blind:
            return
        module = module.whole()
        if not trainer.is_global_zero:
            return
        sheet = self.sheet(module)
        _save(sheet, self.folder / f"epoch_{epoch:04d}.png")
        show(trainer, "attention", sheet)

    @torch.no_grad()
    def sheet(self, module: Any) -> Image.Image:
        """Rows of image, mean, head 0, head 1, ..."""
        images = [image.to(module.device) for image in self.images]
        with autocast(self.precision, module.device):
            views = eval_view(images, self.image_size, module.mean, module.std)
            maps = attention_maps(module.evaluation_backbone(), views).cpu()  # (n, h, gh, gw)
        channels = len(module.mean)
        shown = (
            (eval_view(images, self.image_size, [0.0] * channels, [1.0] * channels) * 255).round().byte().cpu().numpy()
        )
        maps = torch.cat([mean_map(maps)[:, None], maps], dim=1)
        size, factor = (self.side, self.side), self.side // self.image_size
        rows = []
        for picture, small in zip(shown, maps, strict=True):
            picture = render.as_picture(picture).repeat(factor, 0).repeat(factor, 1)
            even = small.mean((-2, -1), keepdim=True).clamp_min(torch.finfo(small.dtype).tiny)
            level = render.levels(upsample(small / even, size).numpy(), (0, BRIGHTEST))
            mask = upsample(mass_mask(small, THRESHOLD), size).numpy()
            rows.append([picture, *render.overlay(picture, level, mask)])
        return tiled(rows, ["image", "mean", *(f"head {i}" for i in range(maps.shape[1] - 1))])


def tiled(rows: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """Pictures uint8 (S, S, 3) in rows and columns, the titles of the columns above."""
    side = len(rows[0][0])
    framed = [[np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for tile in row] for row in rows]
    return titled(np.concatenate([np.concatenate(row, axis=1) for row in framed]), titles, side + GAP)


def titled(body: np.ndarray, titles: list[str], step: int) -> Image.Image:
    """Columns of `step` pixels with a title above each."""
    image = Image.fromarray(np.pad(body, ((HEADER, 0), (0, 0), (0, 0)), constant_values=255))
    pen = ImageDraw.Draw(image)
    for place, title in enumerate(titles):
        pen.text((place * step + 2, 1), title, fill=(0, 0, 0))
    return image


def side_by_side(pictures: dict[int, Path], step: int) -> Image.Image:
    """The images and, epoch by epoch, the mean maps of sheets whose columns are `step` pixels wide; sheets of another
    size than the last (of other options) are left out."""
    sheets = {epoch: np.asarray(Image.open(path).convert("RGB"))[HEADER:] for epoch, path in pictures.items()}
    sheets = {epoch: sheet for epoch, sheet in sheets.items() if sheet.shape == sheets[max(sheets)].shape}
    epochs = [sorted(sheets)[round(place)] for place in np.linspace(0, len(sheets) - 1, min(COLUMNS, len(sheets)))]
    columns = [sheets[epochs[-1]][:, :step], *(sheets[epoch][:, step : 2 * step] for epoch in epochs)]
    return titled(np.concatenate(columns, axis=1), ["image", *(f"epoch {epoch}" for epoch in epochs)], step)


def _save(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
