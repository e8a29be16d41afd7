"""The LightningDataModule: a data set by name, held in memory or read by workers, for training and for evaluation.

    data = ImageDataModule(DataConfig(name="folder", root="photos"))
    trainer.fit(model, datamodule=data)          # under any pl.Trainer
    for images, labels, indices in data.train_dataloader(): ...

Training batches are uint8 and un-augmented: views are made on the device (`views/`), by the methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vit_suite.config import DataConfig
from vit_suite.data.loader import FileLoader, ResidentLoader, auto_workers
from vit_suite.data.order import Batch, EpochPlan
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.registry import dataset_info, open_split, open_test, open_train, statistics
from vit_suite.data.resident import make_resident, to_device
from vit_suite.data.source import ImageSource, ResidentSource, stratified
from vit_suite.errors import UserError, counted

log = logging.getLogger("vit_suite")


class ImageDataModule(pl.LightningDataModule):
    """Images by name.

    Args:
        cfg: which images (`DataConfig`); a dict is taken too.
        seed: of the order, of `length` samples, and of generated images.
        quarantine: where files that do not decode are listed: a `Quarantine`, a path of `quarantine.txt`, or None (they
            are only counted).
        accumulate: micro-batches an optimizer step is split into; the trainer's accumulate_grad_batches when None.
        transform: `(images, batch) -> views`, run in the workers on the images of a micro-batch (see `FileLoader`);
            only for images in files.

    The sets are opened on first use, so every attribute works without `setup()`. Raises UserError for whatever is wrong
    with the input: names, roots, layouts, batch size, too many bad files.
    """

    def __init__(
        self,
        cfg: DataConfig | dict | None = None,
        seed: int = 0,
        quarantine: Quarantine | str | None = None,
        accumulate: int | None = None,
        transform: Callable[[list[Tensor], Batch], Any] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg if isinstance(cfg, DataConfig) else DataConfig(**(cfg or {}))
        self.seed, self.accumulate, self.transform = seed, accumulate, transform
        self.info = dataset_info(self.cfg.name)
        self.mean, self.std = statistics(self.cfg)
        self.quarantine = (
            quarantine if isinstance(quarantine, Quarantine) else Quarantine(quarantine, self.cfg.max_corrupt)
        )
        self._train: ImageSource | None = None
        self._test: ImageSource | None = None

    # -- Lightning -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download, on one process of a node, where `data.download` asks for it."""
        if self.cfg.download and self.info.download:
            open_split(self.cfg, self.cfg.train_split, self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Open the training set and check that the batch fits it; the scored set is opened when it is first asked
        for."""
        if stage in (None, "fit"):
            if self._train is None:
                source = open_train(self.cfg, self.seed)
                EpochPlan(len(source), self.cfg.batch_size)  # said before the set is decoded
                self._train = self._hold(source)
            self.plan()

    def train_dataloader(self) -> ResidentLoader | FileLoader:
        """Batches `(images uint8, labels, indices)` of this rank, in the order of `order.py`."""
        plan, source = self.plan(), self.train_source
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if isinstance(source, ResidentSource):
            if device.type == "cuda" and not to_device(source, device):
                log.info(
                    "%s stays in main memory: it would take more than half of the free memory of %s",
                    source.title,
                    device,
                )
            return ResidentLoader(source, plan)
        local_world = self.trainer.num_devices if self.trainer is not None else 1
        workers = auto_workers(self.cfg.workers, False, local_world)
        decode_on = device if self.cfg.decode == "gpu" else None
        if decode_on is not None and (self.transform is not None or self.cfg.channels != 3):
            raise UserError(
                "data.decode gpu gives RGB in the training process: not with data.channels 1 or views made in the"
                " workers."
            )
        return FileLoader(source, plan, workers, self.quarantine, device.type == "cuda", self.transform, decode_on)

    def plan(self) -> EpochPlan:
        """How an epoch is cut into batches for this rank. UserError when the global batch does not fit the set or the
        ranks."""
        trainer = self.trainer
        accumulate = self.accumulate or (trainer.accumulate_grad_batches if trainer is not None else 1)
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        source, window = self.train_source, self.cfg.shard_window if self.cfg.order == "shards" else 0
        if window and source.shards is None:
            raise UserError(f"data.order shards needs data.name shards; {self.cfg.name} lies in other files.")
        return EpochPlan(
            len(source),
            self.cfg.batch_size,
            self.seed,
            rank,
            world,
            accumulate,
            window,
            source.shards,
            self.cfg.repeats,
        )

    # -- sources ------------------------------------------------------------------------------------------------------

    @property
    def train_source(self) -> ImageSource:
        """The training images, un-augmented; a `ResidentSource` when they are held in memory."""
        if self._train is None:
            self._train = self._hold(open_train(self.cfg, self.seed))
        return self._train

    @property
    def test_source(self) -> ImageSource:
        """The scored images, un-augmented; a `ResidentSource` when they are held in memory."""
        if self._test is None:
            self._test = self._hold(open_test(self.cfg, self.seed))
        return self._test

    def _hold(self, source: ImageSource) -> ImageSource:
        source.quarantine = self.quarantine
        if source.failures:
            self.quarantine.report(list(source.failures), source.title, len(source) + len(source.failures))
        source = make_resident(source, self.cfg.resident, self.cfg.memory_gb, self.quarantine) or source
        source.quarantine = self.quarantine
        where = (
            f"in memory ({source.images.numel() / 2**20:.0f} MiB)"
            if isinstance(source, ResidentSource)
            else "from files"
        )
        images, classes = counted(len(source), "image"), counted(len(source.classes), "class")
        log.info("%s: %s, %s, %s", source.title, images, classes, where)
        return source

    @property
    def resident(self) -> bool:
        """Whether the training images are held in memory."""
        return isinstance(self.train_source, ResidentSource)

    @property
    def threads(self) -> int | None:
        """Threads that decode images to be scored (`data.workers`); None = the cores, at most 8."""
        return None if self.cfg.workers == "auto" else int(self.cfg.workers)

    @property
    def classes(self) -> list[str]:
        """Class names; empty for an unlabeled set."""
        return self.train_source.classes

    @property
    def name(self) -> str:  # type: ignore[override]
        """The set's name as it stands beside scores."""
        return self.train_source.name

    @property
    def scored_on_itself(self) -> bool:
        """Whether the scored split is the one that is trained on: kNN would find each image itself in the bank."""
        return self.test_source.split == self.train_source.split

    def bank(self, size: int | None = None, seed: int | None = None) -> ImageSource:
        """The images that vote in kNN: `size` training images with a label (None or 0: all of them), drawn class by
        class, un-augmented."""
        return self._sample(self.train_source, size, seed)

    def test(self, size: int | None = None, seed: int | None = None) -> ImageSource:
        """`size` images of the scored split that have a label (None or 0: all of them), drawn class by class."""
        return self._sample(self.test_source, size, seed)

    def usable(self, source: ImageSource) -> int:
        """Number of images of `source` that decode, as far as is known: a score was measured on these."""
        bad = self.quarantine.failures.get(source.title)
        return sum(source.path(index) not in bad for index in range(len(source))) if bad else len(source)

    def left_out(self, *sources: ImageSource) -> list[str]:
        """`path: reason` of every file of the splits of these sources that did not decode."""
        titles = dict.fromkeys(source.title for source in sources)
        found = (self.quarantine.failures.get(title, {}) for title in titles)
        return [f"{path}: {reason}" for failures in found for path, reason in failures.items()]

    def _sample(self, source: ImageSource, size: int | None, seed: int | None) -> ImageSource:
        if source.labels is not None and bool((source.labels < 0).any()):  # as in STL-10's train+unlabeled
            source = source.subset((source.labels >= 0).nonzero().squeeze(1))
        if not size or size >= len(source):
            return source
        return source.subset(stratified(source.labels, len(source), size, self.seed if seed is None else seed))
