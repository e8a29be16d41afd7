"""Sheets: pictures of what a method does with images, drawn every few epochs. SiT's rows, for example, are the clean,
the corrupted and the reconstructed images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vit_suite.data.source import ImageSource
from vit_suite.files import write_atomically
from vit_suite.hardware import Precision, autocast
from vit_suite.training.scores import due, show
from vit_suite.views.evaluate import eval_view
from vit_suite.views.resample import Size

COLUMNS = 8
"""Images on a sheet."""
SIDE = 64
"""Smallest side of an image on the sheet in pixels. Smaller ones are enlarged by a whole factor, pixel by pixel."""


class Sheets(pl.Callback):
    """Writes `FOLDER/epoch_NNNN.png` with the rows of `Method.sheet`, always for the same 8 images. Loggers get it too.

    Args:
        folder: folder of the sheets.
        source: the images; the first 8 that decode are drawn.
        image_size: side of a view, or (height, width), in pixels.
        every_epochs: epochs between two sheets. The last epoch always has one.
        precision: precision of the forward pass.
    """

    def __init__(
        self, folder: str | Path, source: ImageSource, image_size: Size, every_epochs: int, precision: Precision
    ):
        self.folder, self.image_size = Path(folder), image_size
        self.every_epochs, self.precision = every_epochs, precision
        found = (source.get(index) for index in range(len(source)))
        self.images = [
            image for image, _ in zip((image for image in found if image is not None), range(COLUMNS), strict=False)
        ]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not (self.images and due(trainer, self.every_epochs)):
            return
        module = module.whole()
        if not trainer.is_global_zero:
            return
        sheet = self.sheet(module)
        path = self.folder / f"epoch_{trainer.current_epoch + 1:04d}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))
        show(trainer, "reconstructions", sheet)

    def sheet(self, module: Any) -> Image.Image:
        """The rows of the method as one picture."""
        images = [image.to(module.device) for image in self.images]
        clean = eval_view(images, self.image_size, module.mean, module.std)
        with autocast(self.precision, module.device):
            rows = module.sheet(clean)
        return draw_sheet([row.float() for row in rows], module.mean, module.std)


def draw_sheet(rows: list[Tensor], mean: list[float], std: list[float]) -> Image.Image:
    """Rows of normalized images (N, C, H, W) as one picture. Of images with other than 1 or 3 channels the first
    channel is shown."""
    middle, spread = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = torch.cat([(row.cpu() * spread + middle).clamp(0, 1) for row in rows])
    if pixels.shape[1] not in (1, 3):
        pixels = pixels[:, :1]
    factor = max(1, -(-SIDE // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(pixels, nrow=len(rows[0]), padding=2, pad_value=1.0)
    return Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
