from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attention.exported import exported
from vit_suite.attention import export, export_worker, formats, grids
from vit_suite.attention.coco import annotation
from vit_suite.attention.grids import cut, view_size
from vit_suite.attention.guided import guided_filter
from vit_suite.attention.manifest import read_manifest
from vit_suite.attention.maps import look, mass_mask, max_map, mean_map, upsample
from vit_suite.config import BackboneConfig, DataConfig
from vit_suite.data.decode import decode
from vit_suite.data.registry import open_test
from vit_suite.errors import UserError
from vit_suite.evaluation.features import frozen
from vit_suite.models import backbone as vit

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


def sizes_in(root, sizes):
    root.mkdir()
    for i, size in enumerate(sizes):
        picture(*size, i).save(root / f"{i:03}.png")
    return root


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


# Everything, with a backbone
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    """Registers, uneven attention, and one patch in ten turned into an artifact (by its color, see `with_artifact`)."""
    torch.manual_seed(0)
    made = vit.Backbone(
        BackboneConfig(patch_size=8, dim=24, depth=3, heads=3, registers=2, image_size=[32, 32], drop_path=0.0)
    )
    with torch.no_grad():
        for weights in made.parameters():
            weights.add_(0.2 * torch.randn_like(weights))
    return made.train()


EVERY = {
    "mean": MEAN,
    "std": STD,
    "formats": ["png", "overlay", "mask", "labels", "npz", "coco"],
    "maps": ["heads", "mean", "max", "rollout"],
    "precision": "fp32",
}
LABELS = ["head0", "head1", "head2", "mean", "max", "rollout"]


def enlarged(mode, maps, pixels):
    """(n, gh, gw) at the size of the picture (C, H, W)."""
    size = tuple(pixels.shape[1:])
    if mode == "nearest":
        return upsample(maps, size)
    smooth = upsample(maps, size, "bilinear")
    return (
        smooth
        if mode == "bilinear"
        else guided_filter(smooth, pixels.float().mean(0) / 255, round(size[0] / maps.shape[1]), 1e-3)
    )


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "guided"])
def test_every_map_and_format(backbone, folder, tmp_path, mode):
    output = tmp_path / "out"
    summary = exported(backbone, folder, output, **EVERY, upsample=mode, threshold=0.5)
    assert backbone.training and torch.get_num_threads() == 1
    assert summary.files == {"png": 36, "overlay": 36, "mask": 36, "labels": 6, "npz": 6, "coco": 1}
    coco = json.loads((output / "coco.json").read_text())
    good = ["a.png", "cats/gray.png", "cats/same.jpg", "cats/same.png", "cats/tabby/alpha.png", "palette.gif"]
    assert [(image["id"], image["file_name"]) for image in coco["images"]] == list(
        zip([1, 3, 4, 5, 6, 7], good, strict=True)
    )
    for image in coco["images"]:  # number 2 does not decode
        pixels = torch.from_numpy(decode(folder / image["file_name"]).copy())
        name = image["file_name"] if image["file_name"] in SIZES else os.path.splitext(image["file_name"])[0]
        assert (image["height"], image["width"]) == SIZES[name] == pixels.shape[1:]
        with np.load(output / f"{name}_attention.npz") as stored:
            heads, *others = (torch.from_numpy(stored[label]) for label in ("attention", "mean", "max", "rollout"))
        check_numbers(backbone, pixels, heads, others)
        shares = torch.stack([one / one.sum() for one in enlarged(mode, heads, pixels)])
        with Image.open(output / f"{name}_labels.png") as labels:
            assert labels.mode == "P" and (np.asarray(labels) == shares.argmax(0).numpy()).mean() > 0.999
        annotations = {one["head"]: one for one in coco["annotations"] if one["image_id"] == image["id"]}
        for label, small in zip(LABELS, [*heads, *others], strict=True):
            drawn = pixels_of(output / f"{name}_{label}_mask.png") > 0
            truth = (
                mass_mask(small, 0.5)[None]
                if mode == "nearest"
                else mass_mask(enlarged(mode, small[None], pixels), 0.5)
            )
            truth = upsample(truth, SIZES[name])[0] if mode == "nearest" else truth[0]
            assert drawn.shape == SIZES[name] and (drawn == truth.numpy()).mean() > 0.999
            found = annotations[label.removeprefix("head")]
            assert found == found | annotation(drawn)


def check_numbers(backbone, pixels, heads, others):
    """Of an npz: mean and max follow from the heads; for an image that needs no resizing all is what `look` says of
    it."""
    torch.testing.assert_close(others[0], heads.mean(0))
    torch.testing.assert_close(others[1], max_map(heads[None])[0])
    if pixels.shape[1] % 8 or pixels.shape[2] % 8:
        return
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad(), frozen(backbone):
        looked = look(backbone, ((pixels / 255 - mean) / std)[None], rollout=True)
    torch.testing.assert_close(heads, looked.heads[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(others[2], looked.rollout[0], atol=1e-5, rtol=1e-4)


def test_the_manifest_lists_every_file(backbone, folder, tmp_path):
    output = tmp_path / "out"
    exported(backbone, folder, output, **EVERY)
    rows = read_manifest(output)
    assert sorted(row["file"] for row in rows if row["file"]) == sorted(
        set(files_of(output)) - {"manifest.csv", "quarantine.txt"}
    )
    (failed,) = [row for row in rows if row["status"] != "ok"]
    assert failed["image"] == str(folder / "cats" / "broken.jpg") and not failed["file"] and "Error" in failed["status"]
    assert [row["image"] for row in rows[:-1]] == sorted(
        (row["image"] for row in rows[:-1]), key=lambda path: path.split(os.sep)
    )
    for row in rows[:-1]:
        if row["status"] == "ok":
            name = os.path.relpath(os.path.splitext(row["image"])[0], folder)
            height, width = SIZES.get(name) or SIZES[os.path.relpath(row["image"], folder)]
            assert (int(row["height"]), int(row["width"])) == (height, width)
            assert (row["threshold"] == "0.6") == (row["kind"] in ("mask", "overlay"))
            assert row["head"] in ("0", "1", "2", "mean", "max", "rollout") or row["kind"] in ("labels", "npz")
    assert rows[-1] | {"kind": "coco", "file": "coco.json", "image": "", "status": "ok"} == rows[-1]


def test_artifacts_are_clipped_in_every_map(backbone, tmp_path, monkeypatch):
    root = sizes_in(tmp_path / "images", [(48, 64)])
    original, place = backbone.vit.blocks[-1].forward, 3 + 2 * 8 + 5  # behind CLS and two registers: row 2, column 5

    def with_artifact(x, **rest):
        x = original(x, **rest).clone()
        x[:, place] = 40 * x[:, place] / x[:, place].norm() * x.norm(dim=-1).median()
        return x

    monkeypatch.setattr(backbone.vit.blocks[-1], "forward", with_artifact)
    options = EVERY | {"formats": ["npz"]}
    plain = exported(backbone, root, tmp_path / "plain", **options)
    clipped = exported(backbone, root, tmp_path / "clipped", **options, clip_artifacts=4.0)
    assert plain.artifacts == 0 and clipped.artifacts == 1
    before, after = (np.load(tmp_path / name / "000_attention.npz") for name in ("plain", "clipped"))
    assert np.argwhere(after["artifacts"]).tolist() == [[2, 5]] and "artifacts" not in before
    for name in ("attention", "rollout"):
        changed = ~np.isclose(before[name], after[name], rtol=1e-4)
        assert np.unique(np.argwhere(changed)[:, -2:], axis=0).tolist() == [[2, 5]]
    around = np.delete(before["rollout"][1:4, 4:7].ravel(), 4)
    assert after["rollout"][2, 5] == pytest.approx(np.sort(around)[3], rel=1e-4)
    np.testing.assert_allclose(after["mean"], after["attention"].mean(0), rtol=1e-5)


def test_a_data_set_and_a_list(backbone, folder, tmp_path):
    options = {"mean": MEAN, "std": STD, "formats": ["mask"], "maps": ["mean"]}
    source = open_test(DataConfig(name="shapes", image_size=24, test_length=11))
    exported(backbone, source, tmp_path / "set", **options)
    assert files_of(tmp_path / "set") == ["manifest.csv", *(f"test/{i:02}_mean_mask.png" for i in range(11))]
    assert read_manifest(tmp_path / "set")[3]["image"] == source.path(3)
    (folder / "some.txt").write_text("cats/same.png\ncats/same.jpg\nnone.jpg\na.png\n")
    summary = exported(backbone, folder / "some.txt", tmp_path / "list", **options)
    expected = [
        "a_mean_mask.png",
        "cats/same.jpg_mean_mask.png",
        "cats/same.png_mean_mask.png",
        "manifest.csv",
        "quarantine.txt",
    ]
    assert files_of(tmp_path / "list") == expected and summary.images == 3
    assert [row["status"] for row in read_manifest(tmp_path / "list")] == ["ok", "ok", "the file does not exist", "ok"]
    whole = exported(backbone, folder, tmp_path / "whole", **options, batch_size=1)
    assert whole.images == 6


def test_each_operation_has_one_thread_and_others_get_theirs_back(folder, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        exported(Backbone(), folder, tmp_path / "out", mean=MEAN, std=STD)  # the backbone looks at the number
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_change_nothing(backbone, folder, tmp_path):
    for workers in (1, 3):
        exported(backbone, folder, tmp_path / str(workers), **EVERY, workers=workers, upsample="bilinear")
    for name in files_of(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
