"""The export with a real backbone: every map and format, manifest, artifacts, data sets, threads."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attention.conftest import MEAN, SIZES, STD, Backbone, files_of, pixels_of, sizes_in
from tests.attention.exported import exported
from vit_suite.attention.coco import annotation
from vit_suite.attention.guided import guided_filter
from vit_suite.attention.manifest import read_manifest
from vit_suite.attention.maps import look, mass_mask, max_map, upsample
from vit_suite.config import BackboneConfig, DataConfig
from vit_suite.data.decode import decode
from vit_suite.data.registry import open_test
from vit_suite.evaluation.features import frozen
from vit_suite.models import backbone as vit


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
