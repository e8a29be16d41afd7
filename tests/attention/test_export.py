"""`vit-suite attention` with a backbone whose attention is known from the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.attention.conftest import MEAN, SIZES, STD, Backbone, files_of, picture, pixels_of, sizes_in
from tests.attention.exported import exported
from vit_suite.attention import export, export_worker, formats, grids
from vit_suite.attention.grids import cut, view_size
from vit_suite.attention.manifest import read_manifest
from vit_suite.attention.maps import mass_mask, mean_map, upsample
from vit_suite.errors import UserError


def test_every_file_of_a_tree(folder, tmp_path):
    output = tmp_path / "out"
    summary = exported(
        Backbone(), folder, output, mean=MEAN, std=STD, formats=["png", "overlay", "mask", "npz"], batch_size=2
    )
    expected = {f"{name}_attention.npz" for name in SIZES} | {"quarantine.txt", "manifest.csv"}
    for name in SIZES:
        for label in ("head0", "head1", "mean"):
            expected |= {f"{name}_{label}_{kind}.png" for kind in ("heat", "overlay", "mask")}
    assert files_of(output) == sorted(expected)
    assert summary.images == 6 and summary.files == {"png": 18, "overlay": 18, "mask": 18, "npz": 6}
    assert [failure.path for failure in summary.failures] == [str(folder / "cats" / "broken.jpg")]
    assert (output / "quarantine.txt").read_text().startswith(f"{folder / 'cats' / 'broken.jpg'}\t")
    assert summary.quarantine == output / "quarantine.txt" and summary.images_per_second > 0
    for name, size in SIZES.items():
        for label in ("head0", "head1", "mean"):
            assert pixels_of(output / f"{name}_{label}_heat.png").shape == (*size, 3)
            assert pixels_of(output / f"{name}_{label}_overlay.png").shape == (*size, 3)
            assert pixels_of(output / f"{name}_{label}_mask.png").shape == size


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_mask_and_npz_hold_the_models_attention(folder, tmp_path, threshold):
    output = tmp_path / "out"
    exported(Backbone(), folder, output, mean=MEAN, std=STD, formats=["mask", "npz"], threshold=threshold)
    for name, size in SIZES.items():
        with np.load(output / f"{name}_attention.npz", allow_pickle=False) as stored:
            maps = torch.from_numpy(stored["attention"])
            assert tuple(stored["image_size"]) == size and tuple(stored["grid"]) == maps.shape[1:]
            assert float(stored["threshold"]) == threshold
            assert str(stored["path"]).startswith(str(folder / name))
            mean = torch.from_numpy(stored["mean"])
        assert mean.equal(mean_map(maps[None])[0])
        torch.testing.assert_close(maps.sum((-2, -1)), torch.full((2,), 0.9))
        for label, small in (("head0", maps[0]), ("head1", maps[1]), ("mean", mean)):
            truth = upsample(mass_mask(small, threshold), size).numpy()
            mask = pixels_of(output / f"{name}_{label}_mask.png")
            assert set(np.unique(mask)) <= {0, 255} and (mask == truth * 255).all()
            assert 0 < truth.mean() < 1
    # an image whose sides are multiples of the patch reaches the backbone as it is
    whole = pixels_of(folder / "a.png").astype(np.float64).mean(2) / 255
    patches = whole.reshape(4, 8, 6, 8).mean((1, 3)) + 0.01
    with np.load(output / "a_attention.npz") as stored:
        np.testing.assert_allclose(stored["attention"][0], 0.9 * patches / patches.sum(), rtol=1e-4)


def test_heat_map_has_its_peak_where_the_attention_has(folder, tmp_path):
    output = tmp_path / "out"
    exported(Backbone(), folder / "a.png", output, mean=MEAN, std=STD, formats=["png", "npz"], maps=["heads"])
    assert files_of(output) == ["a_attention.npz", "a_head0_heat.png", "a_head1_heat.png", "manifest.csv"]
    with np.load(output / "a_attention.npz") as stored:
        peak = np.unravel_index(stored["attention"][1].argmax(), stored["grid"])
    heat = pixels_of(output / "a_head1_heat.png").astype(int).sum(2)
    found = np.unravel_index(heat.argmax(), heat.shape)
    assert (found[0] // 8, found[1] // 8) == peak


def test_images_of_one_grid_share_a_batch(tmp_path):
    root = sizes_in(tmp_path / "images", [(32, 32), (24, 40)] * 32)
    backbone = Backbone()
    summary = exported(backbone, root, tmp_path / "out", mean=MEAN, std=STD, formats=["npz"], batch_size=1, workers=1)
    assert {shape[0] for shape in backbone.batches} == {1} and len(backbone.batches) == 64
    assert summary.images == 64 and len(files_of(tmp_path / "out")) == 65

    backbone = Backbone()
    root = sizes_in(tmp_path / "more", [(32, 32), (24, 40)] * 64)  # blocks of 4
    exported(backbone, root, tmp_path / "out2", mean=MEAN, std=STD, formats=["npz"], batch_size=2, workers=1)
    assert {shape[0] for shape in backbone.batches} == {2} and {shape[2:] for shape in backbone.batches} == {
        (32, 32),
        (24, 40),
    }


def test_blocks_depend_on_the_images_alone_and_hold_whole_batches():
    for images in (1, 5, 31, 100, 1000, 100_000):
        blocks = cut(images, 16)
        assert [index for block in blocks for index in block] == list(range(images))
        lengths = {len(block) for block in blocks[:-1]}
        assert (
            len(lengths) <= 1
            and all(length <= 16 or length % 16 == 0 for length in lengths)
            and max(map(len, blocks)) <= 64
        )
    assert [len(cut(images, 16)[0]) for images in (1, 8, 20, 200, 1000, 2000, 100_000)] == [1, 1, 3, 16, 16, 48, 64]


def test_waiting_pictures_and_attention_stay_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "cut", lambda images, batch_size: [range(images)])
    root = sizes_in(tmp_path / "images", [(32, 32 + 8 * i) for i in range(12)])  # no two share a grid
    monkeypatch.setattr(export_worker, "WAITING_BYTES", 3 * 32 * 150 * 3)
    held, original = [], export_worker.Worker._look
    watch = lambda self, batch: held.append([job.picture.shape[2] for job in batch]) or original(self, batch)  # noqa: E731
    monkeypatch.setattr(export_worker.Worker, "_look", watch)
    exported(Backbone(), root, tmp_path / "out", mean=MEAN, std=STD, formats=["npz"], batch_size=100)
    assert sorted(held) == [[32 + 8 * i] for i in range(12)]
    assert len(files_of(tmp_path / "out")) == 13

    monkeypatch.setattr(grids, "ATTENTION_BYTES", 2 * 4 * 2 * 17**2)  # two images of 16 patches
    same = sizes_in(tmp_path / "same", [(32, 32)] * 5)
    held.clear()
    exported(Backbone(), same, tmp_path / "out2", mean=MEAN, std=STD, formats=["npz"], batch_size=100)
    assert held == [[32, 32], [32, 32], [32]]


def test_token_limit_resize_and_tiny_images(tmp_path):
    assert view_size((64, 64), 16, None, 4096) == (64, 64)
    assert view_size((375, 500), 16, None, 4096) == (368, 496)
    assert view_size((375, 500), 16, 224, 4096) == (224, 304)
    assert view_size((3, 5), 16, None, 4096) == (16, 16)
    rows, columns = (side // 8 for side in view_size((3000, 4000), 8, None, 1000))
    assert 900 < rows * columns <= 1000 and abs(columns / rows - 4 / 3) < 0.1
    rows, columns = (side // 8 for side in view_size((8, 100000), 8, None, 100))
    assert rows == 1 and columns == 100

    root = tmp_path / "images"
    root.mkdir()
    picture(5, 3, 0).save(root / "tiny.png")
    picture(80, 160, 1).save(root / "wide.png")
    backbone = Backbone()
    summary = exported(
        backbone, root, tmp_path / "out", mean=MEAN, std=STD, formats=["overlay"], maps=["mean"], max_tokens=50
    )
    assert summary.shrunk == 1 and summary.coarse == 1
    assert pixels_of(tmp_path / "out" / "tiny_mean_overlay.png").shape == (5, 3, 3)
    assert pixels_of(tmp_path / "out" / "wide_mean_overlay.png").shape == (80, 160, 3)
    exported(backbone, root / "tiny.png", tmp_path / "out2", mean=MEAN, std=STD, formats=["mask"], image_size=24)
    assert backbone.batches[-1][2:] == (40, 24)


def test_bilinear_masks_are_taken_pixel_by_pixel(folder, tmp_path):
    output = tmp_path / "out"
    options = {"mean": MEAN, "std": STD, "formats": ["mask", "npz"], "upsample": "bilinear", "maps": ["heads"]}
    exported(Backbone(), folder / "a.png", output, **options)
    with np.load(output / "a_attention.npz") as stored:
        smooth = upsample(torch.from_numpy(stored["attention"]), (32, 48), "bilinear")
    assert (pixels_of(output / "a_head1_mask.png") == mass_mask(smooth)[1].numpy() * 255).all()


def test_gray_and_many_channels(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    np.save(root / "five.npy", np.random.default_rng(0).integers(0, 256, (5, 16, 24), dtype=np.uint8))
    five = [0.5] * 5
    backbone = Backbone(mean=five, std=five)
    exported(backbone, root, tmp_path / "out", mean=five, std=five, formats=["overlay"])
    assert backbone.batches == [(1, 5, 16, 24)]
    gray = Backbone(mean=[0.5], std=[0.5])
    picture(16, 16).save(root / "five.png")
    exported(gray, root / "five.png", tmp_path / "out2", mean=[0.5], std=[0.5])
    assert gray.batches == [(1, 1, 16, 16)]


def test_wrong_input_is_one_message_and_writes_nothing(folder, tmp_path):
    output, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    given = {"backbone": Backbone(), "images": folder, "output": output, "mean": MEAN, "std": STD}
    cases = [
        ({"images": tmp_path / "nowhere"}, "nowhere' does not exist"),
        ({"images": empty}, "no images under .*empty.*nothing"),
        ({"formats": ["overlai"]}, "unknown format 'overlai'. Did you mean 'overlay'"),
        ({"formats": []}, "no format"),
        ({"maps": ["had"]}, "unknown map 'had'. Did you mean 'heads'"),
        ({"maps": []}, "no map"),
        ({"clip_artifacts": 0.5}, "clip_artifacts is 0.5"),
        ({"upsample": "cubic"}, "unknown upsampling"),
        ({"backbone": Backbone(prefix_tokens=0)}, "no CLS token.*vit-suite localize.*use a model with one"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"output": folder}, "images folder itself"),
        ({"output": folder / "a.png"}, "is a file"),
        ({"output": tmp_path}, "is not empty.*--overwrite"),
        ({"images": folder / "cats" / "broken.jpg"}, "none of the 1 images.*broken.jpg"),
    ]
    before = files_of(tmp_path)
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            exported(**(given | change))
        assert files_of(tmp_path) == before and not output.exists()


def test_overwrite_replaces_and_a_folder_inside_the_images_is_no_input(folder, tmp_path):
    output = folder / "attention"
    given = {"backbone": Backbone(), "images": folder, "output": output, "mean": MEAN, "std": STD, "formats": ["mask"]}
    first = exported(**given, threshold=0.2)
    before = files_of(output), pixels_of(output / "a_mean_mask.png").mean()
    (folder / "cats" / "broken.jpg").unlink()
    second = exported(**given, threshold=0.9, overwrite=True)
    assert first.images == second.images == 6
    assert files_of(output) == [name for name in before[0] if name != "quarantine.txt"]
    assert {row["status"] for row in read_manifest(output)} == {"ok"}
    assert pixels_of(output / "a_mean_mask.png").mean() > before[1] + 50


def test_a_failure_to_write_stops_the_export(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "write_png", full)
    with pytest.raises(OSError, match="No space left"):
        exported(Backbone(), folder, tmp_path / "out", mean=MEAN, std=STD)
    assert not (tmp_path / "out").exists()
