from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite.attention import export
from vit_suite.attention.export import export_attention, output_names, view_size
from vit_suite.attention.maps import mass_mask, mean_map, upsample
from vit_suite.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


class Backbone:
    """CLS attention of head i follows the mean over channels of patch pixels, to the power i + 1: known from the image alone."""

    def __init__(self, patch_size=8, heads=2, prefix_tokens=1, mean=MEAN, std=STD):
        self.patch_size, self.heads, self.prefix_tokens = patch_size, heads, prefix_tokens
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        self.batches = []

    def last_attention(self, images):
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(images.shape))
        pixels = (images * self.std + self.mean).clamp(0, 1)
        patches = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), self.patch_size).flatten(1) + 0.01  # (B, N)
        tokens = self.prefix_tokens + patches.shape[1]
        attention = torch.full((len(images), self.heads, tokens, tokens), 1.0 / tokens)
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
    """A tree: two sizes, non-square, grey, alpha, palette, a name twice with other extensions, a broken file, a note."""
    root = tmp_path / "images"
    (root / "cats" / "tabby").mkdir(parents=True)
    picture(32, 48, 1).save(root / "a.png")
    picture(40, 40, 2).save(root / "cats" / "same.png")
    picture(32, 48, 3).save(root / "cats" / "same.jpg")
    picture(30, 21, 4, channels=1).save(root / "cats" / "grey.png")
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
    "cats/grey": (30, 21),
    "cats/tabby/alpha": (64, 24),
    "palette": (32, 48),
}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files_of(output):
    return sorted(os.path.relpath(path, output) for path in output.rglob("*") if path.is_file())


def test_every_file_of_a_tree(folder, tmp_path):
    output = tmp_path / "out"
    summary = export_attention(Backbone(), folder, output, mean=MEAN, std=STD, formats=["png", "overlay", "mask", "npz"], batch_size=2)
    expected = {f"{name}_attention.npz" for name in SIZES} | {"quarantine.txt"}
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
    export_attention(Backbone(), folder, output, mean=MEAN, std=STD, formats=["mask", "npz"], threshold=threshold)
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
    export_attention(Backbone(), folder / "a.png", output, mean=MEAN, std=STD, formats=["png", "npz"], heads="heads")
    assert files_of(output) == ["a_attention.npz", "a_head0_heat.png", "a_head1_heat.png"]
    with np.load(output / "a_attention.npz") as stored:
        peak = np.unravel_index(stored["attention"][1].argmax(), stored["grid"])
    heat = pixels_of(output / "a_head1_heat.png").astype(int).sum(2)
    found = np.unravel_index(heat.argmax(), heat.shape)
    assert (found[0] // 8, found[1] // 8) == peak


def test_images_of_one_grid_share_a_batch(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(10):
        picture(*((32, 32) if i % 2 else (24, 40)), i).save(root / f"{i}.png")
    backbone = Backbone()
    summary = export_attention(backbone, root, tmp_path / "out", mean=MEAN, std=STD, formats=["npz"], batch_size=4)
    assert sorted(shape[0] for shape in backbone.batches) == [1, 1, 4, 4]
    assert {shape[2:] for shape in backbone.batches} == {(32, 32), (24, 40)}
    assert summary.images == 10 and len(files_of(tmp_path / "out")) == 10


def test_waiting_pictures_and_attention_stay_within_bounds(tmp_path, monkeypatch):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(12):
        picture(32, 32 + 8 * i, i).save(root / f"{i:02}.png")  # no two share a grid
    monkeypatch.setattr(export, "WAITING_BYTES", 3 * 32 * 150 * 3)
    backbone, held, original = Backbone(), [], export._forward
    export_attention(backbone, root, tmp_path / "out", mean=MEAN, std=STD, formats=["npz"], batch_size=100)
    assert len(backbone.batches) == 12
    assert len(files_of(tmp_path / "out")) == 12

    monkeypatch.setattr(export, "ATTENTION_BYTES", 2 * 4 * 2 * 17**2)  # two images of 16 patches
    same = tmp_path / "same"
    same.mkdir()
    for i in range(5):
        picture(32, 32, i).save(same / f"{i}.png")
    monkeypatch.setattr(export, "_forward", lambda backbone, batch, *rest: held.append(len(batch)) or original(backbone, batch, *rest))
    export_attention(Backbone(), same, tmp_path / "out2", mean=MEAN, std=STD, formats=["npz"], batch_size=100)
    assert held == [2, 2, 1]


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
    summary = export_attention(backbone, root, tmp_path / "out", mean=MEAN, std=STD, formats=["overlay"], heads="mean", max_tokens=50)
    assert summary.shrunk == 1 and summary.coarse == 1
    assert pixels_of(tmp_path / "out" / "tiny_mean_overlay.png").shape == (5, 3, 3)
    assert pixels_of(tmp_path / "out" / "wide_mean_overlay.png").shape == (80, 160, 3)
    export_attention(backbone, root / "tiny.png", tmp_path / "out2", mean=MEAN, std=STD, formats=["mask"], resize=24)
    assert backbone.batches[-1][2:] == (40, 24)


def test_bilinear_masks_are_taken_pixel_by_pixel(folder, tmp_path):
    output = tmp_path / "out"
    options = {"mean": MEAN, "std": STD, "formats": ["mask", "npz"], "upsample": "bilinear", "heads": "heads"}
    export_attention(Backbone(), folder / "a.png", output, **options)
    with np.load(output / "a_attention.npz") as stored:
        smooth = upsample(torch.from_numpy(stored["attention"]), (32, 48), "bilinear")
    assert (pixels_of(output / "a_head1_mask.png") == mass_mask(smooth)[1].numpy() * 255).all()


def test_grey_and_many_channels(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    np.save(root / "five.npy", np.random.default_rng(0).integers(0, 256, (5, 16, 24), dtype=np.uint8))
    five = [0.5] * 5
    backbone = Backbone(mean=five, std=five)
    export_attention(backbone, root, tmp_path / "out", mean=five, std=five, formats=["overlay"])
    assert backbone.batches == [(1, 5, 16, 24)]
    grey = Backbone(mean=[0.5], std=[0.5])
    picture(16, 16).save(root / "five.png")
    export_attention(grey, root / "five.png", tmp_path / "out2", mean=[0.5], std=[0.5])
    assert grey.batches == [(1, 1, 16, 16)]


def test_names_that_differ_in_extension_or_case_alone():
    assert output_names(["a.jpg", "b.png"]) == ["a", "b"]
    assert output_names(["a.jpg", "a.png", "x/a.jpg"]) == ["a.jpg", "a.png", "x/a"]
    assert output_names(["a.jpg", "a.jpg.png", "a.png"]) == ["a.jpg", "a.jpg.png", "a.png"]
    names = output_names(["A.jpg", "a.jpg", "a.png"])
    assert len({name.lower() for name in names}) == 3


def test_wrong_input_is_one_message_and_writes_nothing(folder, tmp_path):
    output, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    given = {"backbone": Backbone(), "images": folder, "output": output, "mean": MEAN, "std": STD}
    cases = [
        ({"images": tmp_path / "nowhere"}, "nowhere' does not exist"),
        ({"images": empty}, "no images under .*empty.*nothing"),
        ({"formats": ["overlai"]}, "unknown format 'overlai'. Did you mean 'overlay'"),
        ({"formats": []}, "no format"),
        ({"heads": "al"}, "unknown heads 'al'"),
        ({"upsample": "cubic"}, "unknown upsampling"),
        ({"backbone": Backbone(prefix_tokens=0)}, "no CLS token.*use a model with one"),
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
            export_attention(**(given | change))
        assert files_of(tmp_path) == before and not output.exists()


def test_overwrite_replaces_and_a_folder_inside_the_images_is_no_input(folder, tmp_path):
    output = folder / "attention"
    given = {"backbone": Backbone(), "images": folder, "output": output, "mean": MEAN, "std": STD, "formats": ["mask"]}
    first = export_attention(**given, threshold=0.2)
    before = files_of(output), pixels_of(output / "a_mean_mask.png").mean()
    (folder / "cats" / "broken.jpg").unlink()
    second = export_attention(**given, threshold=0.9, overwrite=True)
    assert first.images == second.images == 6
    assert files_of(output) == [name for name in before[0] if name != "quarantine.txt"]
    assert pixels_of(output / "a_mean_mask.png").mean() > before[1] + 50


def test_a_failure_to_write_stops_the_export(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.render, "write_png", full)
    with pytest.raises(OSError, match="No space left"):
        export_attention(Backbone(), folder, tmp_path / "out", mean=MEAN, std=STD)
