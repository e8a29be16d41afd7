"""data.decode gpu, its steps on a CPU: the pixels, replacements and order of the decoder in the workers, whatever the
files are."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from PIL import Image

from vit_suite import DINO
from vit_suite.config import BackboneConfig, DataConfig, DINOConfig, PretrainConfig, ViewsConfig
from vit_suite.data.gpu_decode import check_decoder, decode_jpegs, is_plain, read_file
from vit_suite.data.loader import FileLoader
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import EpochPlan
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.source import ArraySource, FileSource
from vit_suite.errors import UserError
from vit_suite.training.parts import check_decode

CPU = torch.device("cpu")
SIZES = [(40, 30), (33, 57), (64, 64)]
PLAIN = {"color.jpg": {}, "progressive.JPEG": {"progressive": True, "subsampling": 0}, "gray.jpg": {}}


def picture(name: str, size: tuple[int, int]) -> Image.Image:
    """Smooth colors, of the kind that the name begins with."""
    coarse = np.random.default_rng(len(name)).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mode = "L" if name.startswith("gray") else "CMYK" if name.startswith("cmyk") else "RGB"
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(folder, name: str, number: int, **options) -> str:
    picture(name, SIZES[number % 3]).save(folder / f"{number:02d}-{name}", **options)
    return f"{number:02d}-{name}"


@pytest.fixture
def source(tmp_path) -> FileSource:
    """Files that a GPU decodes, and files that it would decode otherwise or not at all."""
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = PLAIN | {"turned.jpg": {"exif": turned}, "cmyk.jpg": {}, "rgb.jpg": {"keep_rgb": True}, "other.png": {}}
    paths = [save(tmp_path, name, number, **options) for number, (name, options) in enumerate([*kinds.items()] * 2)]
    return FileSource("set", "train", tmp_path, paths, 3, ["a", "b"], [number % 2 for number in range(len(paths))])


def damage(source: FileSource) -> dict[str, list[int]]:
    """Spoil some files; which, by who notices: the worker that reads them, or the decoder that they come to."""
    cut, missing, hollow, word = 0, 1, 7, 8
    path = [source.path(index) for index in range(len(source))]
    content = source.content(cut)
    with open(path[cut], "wb") as file:
        file.write(content[: len(content) // 2])
    with open(path[word], "wb") as file:
        file.write(b"no image")
    content = bytearray(source.content(hollow))
    table = content.index(b"\xff\xc4")  # Huffman codes: the header stays readable, and the end is there
    content[table + 5 : table + 21] = b"\xff" * 16
    with open(path[hollow], "wb") as file:
        file.write(content)
    source.paths[missing] = b"gone.jpg"
    return {"worker": [cut, missing, word], "decoder": [hollow]}


def test_who_decodes_what(source):
    kinds = {
        name.split("-")[1]
        for name in map(bytes.decode, source.paths)
        if read_file(source, source.paths.tolist().index(name.encode())).ndim == 1
    }
    assert kinds == set(PLAIN)
    content = source.content(0)
    assert (
        is_plain(content)
        and not is_plain(content[:-1])
        and not is_plain(content[1:])
        and not is_plain(b"\xff\xd8\xff\xd9")
    )
    cmyk = source.content(4)
    adobe = cmyk.index(b"\xff\xee")  # the mark that says so
    assert not is_plain(cmyk[:adobe] + cmyk[adobe + 2 + int.from_bytes(cmyk[adobe + 2 : adobe + 4]) :])
    assert source.subset([1]).content(0) == source.content(1)
    array = ArraySource("array", "train", np.zeros((1, 3, 4, 4), np.uint8), 3, [], None)
    assert array.content(0) is None and read_file(array, 0).shape == (3, 4, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_labels_and_order(source, workers):
    plan = EpochPlan(len(source), 7, seed=3)
    loader = FileLoader(source, plan, workers, decode_on=CPU)
    for epoch in range(2):
        batches = list(loader)
        assert torch.equal(torch.cat([batch[2] for batch in batches]), plan.order(epoch))
        for images, labels, indices in batches:
            for image, label, index in zip(images, labels, indices.tolist(), strict=True):
                assert torch.equal(image, source.load(index)) and label == source.label(index)
    loader.close()


def test_files_of_one_length_stay_files(tmp_path):
    """Two images of one size are stacked; two files of one length are not."""
    path = save(tmp_path, "color.jpg", 0)
    source = FileSource("set", "train", tmp_path, [path] * 4, 3)
    ((images, labels, _),) = FileLoader(source, EpochPlan(4, 4), decode_on=CPU)
    assert (
        len(images) == 4 and all(torch.equal(image, source.load(0)) for image in images) and labels.tolist() == [-1] * 4
    )
    save(tmp_path, "other.png", 0)
    ((images, *_),) = FileLoader(
        FileSource("set", "train", tmp_path, ["00-other.png"] * 4, 3), EpochPlan(4, 4), decode_on=CPU
    )
    assert isinstance(images, torch.Tensor) and images.shape == (4, 3, 30, 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_replaced_and_listed_as_ever(source, tmp_path, workers):
    spoilt = damage(source)
    assert [read_file(source, index).ndim for index in spoilt["decoder"]] == [1]
    found = {}
    for decode_on in (None, CPU):
        file = tmp_path / f"{decode_on}.txt"
        loader = FileLoader(
            source, EpochPlan(len(source), 7), workers, Quarantine(file, limit=1.0), decode_on=decode_on
        )
        found[decode_on] = list(loader), sorted(file.read_text().splitlines())
        loader.close()
    assert found[CPU][1] == found[None][1] and len(found[CPU][1]) == 4
    for ours, theirs in zip(found[CPU][0], found[None][0], strict=True):
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
        assert all(torch.equal(one, other) for one, other in zip(ours[0], theirs[0], strict=True))
    strict = FileLoader(source, EpochPlan(len(source), len(source)), workers, Quarantine(limit=0.2), decode_on=CPU)
    with pytest.raises(UserError, match="of the 14 images of set train do not decode"):
        list(strict)


def test_a_refusal_is_found_one_by_one(source, monkeypatch):
    damage(source)
    calls, decode = [], torchvision.io.decode_jpeg
    monkeypatch.setattr(
        torchvision.io,
        "decode_jpeg",
        lambda files, *args, **kwargs: calls.append(len(files)) or decode(files, *args, **kwargs),
    )
    files = [read_file(source, index) for index in (2, 7, 9)]
    found = decode_jpegs(files, CPU)
    assert calls == [3, 1, 1, 1] and [pixels is None for pixels in found] == [False, True, False]
    assert torch.equal(found[0], source.load(2)) and decode_jpegs([], CPU) == []


def test_no_memory_is_no_refusal(source, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        decode_jpegs([read_file(source, 0)], CPU)


def test_training_is_that_of_the_workers_decoder(source, tmp_path):
    """Views of images of different sizes, through the data module and a Trainer."""
    losses = {}
    for decode in ("cpu", "gpu"):
        torch.manual_seed(0)
        data = ImageDataModule(DataConfig(name="flat", root=str(tmp_path), batch_size=7, workers=0, decode=decode))
        views = ViewsConfig(global_size=32, local_size=16, local_crops=2)
        method = DINOConfig(out_dim=32, hidden_dim=16, bottleneck_dim=8)
        module = DINO(method, BackboneConfig(patch_size=8, dim=24, depth=1, heads=3), views, batch_size=7)
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, log_every_n_steps=1, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, data)
        losses[decode] = float(trainer.callback_metrics["train/loss"])
    assert losses["cpu"] == losses["gpu"]


@pytest.mark.parametrize(
    ("options", "kind", "views", "message"),
    [
        ({}, "cpu", "auto", "this training is on a CPU: use data.decode cpu."),
        ({"channels": 1}, "cuda", "auto", "it gives RGB, and data.channels is 1"),
        ({"resident": True}, "cuda", "auto", "the images are held in memory"),
        ({}, "cuda", "workers", "views.backend workers needs the pixels in the workers"),
    ],
)
def test_refused(source, tmp_path, options, kind, views, message):
    for path in tmp_path.iterdir():
        Image.new("RGB", (8, 8)).save(path)
    data = DataConfig(
        **{"name": "flat", "root": str(tmp_path), "batch_size": 4, "resident": False, "decode": "gpu"} | options
    )
    cfg = PretrainConfig(data=data, views=ViewsConfig(backend=views))
    with pytest.raises(UserError, match=f"data.decode is gpu, but .*{message}"):
        check_decode(cfg, ImageDataModule(cfg.data), torch.device(kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(source):
    """The GPU's pixels are those of the CPU to a few levels."""
    loader = FileLoader(source, EpochPlan(len(source), 7), decode_on=torch.device("cuda"))
    for images, _, indices in loader:
        for image, index in zip(images, indices.tolist(), strict=True):
            assert image.device.type == "cuda" and image.dtype == torch.uint8
            assert (image.cpu().float() - source.load(index).float()).abs().mean() < 4, source.path(index)


def test_a_device_that_decodes_nothing_is_not_asked_for_a_run(monkeypatch):
    check_decoder(CPU)

    def unfit(*_, **__):
        raise RuntimeError("driver version is\ninsufficient")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", unfit)
    with pytest.raises(
        UserError, match=r"torchvision decodes no JPEG on cpu \(driver version is insufficient\): use data.decode cpu"
    ):
        check_decoder(CPU)


def test_a_broken_device_is_no_refused_file(monkeypatch):
    def broken(*_, **__):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", broken)
    with pytest.raises(torch.AcceleratorError):
        decode_jpegs([torch.zeros(4, dtype=torch.uint8)] * 2, CPU)
