"""The data module from Python and under a real Trainer."""

import os

import pytest
import pytorch_lightning as pl
import torch

from tests.data.make import folder_set, make_files
from vit_suite.config import DataConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import epoch_order
from vit_suite.errors import UserError


def test_module_from_python(tmp_path):
    data = ImageDataModule(
        DataConfig(name="folder", root=str(folder_set(tmp_path / "pets")), batch_size=8, test_length=10)
    )
    images, labels, indices = next(iter(data.train_dataloader()))
    assert (
        images.shape == (8, 3, 8, 8)
        and set(labels.tolist()) == {0, 1}
        and (labels == data.train_source.labels[indices]).all()
    )
    assert data.resident and data.classes == ["a", "b"] and data.name == "pets" and data.mean == [0.485, 0.456, 0.406]
    assert len(data.test_source) == 10 and len(data.bank(6)) == 6 and len(data.bank()) == 24 and len(data.test(0)) == 10
    assert torch.bincount(data.bank(6).labels).tolist() == [3, 3]


def test_images_without_a_label_train_but_neither_vote_nor_are_scored(tmp_path):
    make_files(tmp_path, 6)
    names = sorted(path.name for path in tmp_path.iterdir())
    for split in ("train", "test"):
        lines = [f"{name}\t{'ab'[i % 2]}" if i < 4 else name for i, name in enumerate(names)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    data = ImageDataModule(DataConfig(name="list", root=str(tmp_path), batch_size=2))
    assert len(data.train_source) == 6 and len(data.test_source) == 6
    for part in (data.bank(), data.test(0), data.bank(5)):
        assert part.labels.tolist() == [0, 1, 0, 1] and len(part) == 4
    assert len(data.bank(2)) == 2


def test_module_errors(tmp_path):
    root = folder_set(tmp_path / "pets")
    with pytest.raises(UserError, match="batch_size 25 is larger than the data set of 24"):
        ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=25)).setup()
    with pytest.raises(UserError, match="1 ranks x 3 accumulated"):
        ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=8), accumulate=3).setup()
    with pytest.raises(UserError, match="unknown data set"):
        ImageDataModule(DataConfig(name="foldr"))
    for name in ("000.png", "001.png"):
        (root / "train" / "a" / name).write_bytes(b"x")
    data = ImageDataModule(
        DataConfig(name="folder", root=str(root), batch_size=8), quarantine=str(tmp_path / "run" / "quarantine.txt")
    )
    with pytest.raises(UserError, match="2 of the 24 images of pets train do not decode"):
        data.setup()
    assert "000.png\t" in (tmp_path / "run" / "quarantine.txt").read_text()


class Recorder(pl.LightningModule):
    """Trains one number and writes down the indices it is shown; stops after `stop` batches."""

    def __init__(self, stop=None):
        super().__init__()
        self.weight, self.seen, self.stop = torch.nn.Parameter(torch.zeros(())), [], stop

    def training_step(self, batch, batch_idx):
        images, labels, indices = batch
        self.seen.append((self.current_epoch, indices.tolist()))
        return self.weight * images.float().mean()

    def on_train_batch_end(self, *_):
        if self.stop and len(self.seen) == self.stop:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/mid.ckpt")
            self.trainer.should_stop = True
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, root, model, checkpoint=None, resident="auto", accumulate=1, epochs=3):
    data = ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=8, resident=resident, workers=1))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=str(tmp_path),
    )
    try:
        trainer.fit(model, data, ckpt_path=checkpoint)
    except (KeyboardInterrupt, SystemExit):
        pass
    return model.seen


@pytest.mark.parametrize("resident", ["auto", False])
def test_trainer_resumes_in_mid_epoch_with_the_same_batches(tmp_path, resident):
    root = folder_set(tmp_path / "pets")
    whole = fit(tmp_path, root, Recorder(), resident=resident)
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sum((indices for epoch, indices in whole if epoch == 2), []) == epoch_order(24, 0, 2).tolist()
    for stop in (2, 3, 4):  # within an epoch, at its end, after its first batch
        before = fit(tmp_path, root, Recorder(stop), resident=resident)
        after = fit(tmp_path, root, Recorder(), checkpoint=f"{tmp_path}/mid.ckpt", resident=resident)
        assert before + after == whole, stop


def test_trainer_accumulation_sees_the_same_global_batches(tmp_path):
    root = folder_set(tmp_path / "pets")
    whole, split = fit(tmp_path, root, Recorder(), epochs=1), fit(tmp_path, root, Recorder(), accumulate=2, epochs=1)
    assert [indices for _, indices in whole] == [split[i][1] + split[i + 1][1] for i in range(0, 6, 2)]


@pytest.mark.real
@pytest.mark.skipif("VIT_SUITE_DATA" not in os.environ, reason="needs VIT_SUITE_DATA")
def test_real_tiny_imagenet_from_files_equals_memory():
    common = {"name": "tiny_imagenet", "train_split": "val", "batch_size": 64, "length": 200}
    files = ImageDataModule(DataConfig(resident=False, workers=2, **common), seed=3)
    held = ImageDataModule(DataConfig(resident=True, **common), seed=3)
    assert held.resident and not files.resident
    for one, two in zip(files.train_dataloader(), held.train_dataloader(), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])
