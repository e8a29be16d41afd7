from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from tests.attention.exported import exported
from tests.attention.test_export import MEAN, STD, Backbone
from vit_suite.attention.animate import write_animation
from vit_suite.attention.manifest import read_manifest
from vit_suite.errors import UserError


def gif_frames(path):
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]


def drawn(count):
    return [np.full((9, 11, 3), (20 * i, 40, 200 - 20 * i), np.uint8) for i in range(count)]


def test_a_gif_has_one_palette(tmp_path):
    frames = drawn(8)
    write_animation(tmp_path / "a.gif", lambda numbers: (frames[i] for i in numbers), 8, 20)
    for found, frame in zip(gif_frames(tmp_path / "a.gif"), frames, strict=True):
        assert np.abs(found - frame).max() <= 4
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 50 and image.info["loop"] == 0
        palette = image.getpalette()
        image.seek(5)
        assert image.tile and not getattr(image, "local_palette", None) and palette


def test_an_mp4_takes_odd_sides(tmp_path):
    av = pytest.importorskip("av")
    frames = drawn(8)
    write_animation(tmp_path / "a.mp4", lambda numbers: (frames[i] for i in numbers), 8, 20)
    with av.open(str(tmp_path / "a.mp4")) as container:
        found = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 20
    assert found[0].shape == (10, 12, 3)
    assert all(np.abs(one[:9, :11] - frame).mean() < 8 for one, frame in zip(found, frames, strict=True))


def test_without_pyav_one_sentence_and_nothing_written(tmp_path, monkeypatch):
    original = builtins.__import__

    def missing(name, *rest, **named):
        if name == "av":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    (tmp_path / "clip.mov").write_bytes(b"x")
    for images, formats in ((tmp_path / "images", ["mp4"]), (tmp_path / "clip.mov", ["overlay"])):
        with pytest.raises(UserError, match="needs PyAV: pip install"):
            exported(Backbone(), images, tmp_path / "out", mean=MEAN, std=STD, formats=formats)
    assert not (tmp_path / "out").exists()


def test_colors_are_fixed_over_frames(tmp_path):
    """A frame whose map is the same at half the strength is drawn darker, not stretched to the full range as a picture
    of its own."""
    root = tmp_path / "images"
    root.mkdir()

    class Fading(Backbone):
        def last_attention(self, images, rows):
            attention = super().last_attention(images, rows)
            strength = ((images * self.std + self.mean)[:, 2, 0, 0] * 255).round()  # the corner's blue tells
            return attention * torch.where(strength > 100, 0.5, 1.0).view(-1, 1, 1, 1)

    for i in range(4):
        pixels = np.full((32, 32, 3), 128, np.uint8)
        pixels[8:16, 8:16] = 250
        pixels[:4, :4] = (0, 70, 180, 250)[i]  # equal frames would be one
        pixels[0, 0, 2] = 0 if i < 2 else 200
        Image.fromarray(pixels).save(root / f"{i}.png")
    (root / "2b.png").write_bytes(b"broken")
    options = {"mean": MEAN, "std": STD, "formats": ["gif", "png"], "maps": ["mean"], "fps": 4}
    exported(Fading(), root, tmp_path / "out", **options)
    (path,) = (tmp_path / "out").glob("*.gif")
    frames = gif_frames(path)
    assert path.name == "animation_mean.gif" and len(frames) == 4
    bright = [frame[9:15, 9:15].mean() for frame in frames]
    assert bright[0] == pytest.approx(bright[1], abs=6) and bright[2] == pytest.approx(bright[3], abs=6)
    assert max(bright[2:]) < min(bright[:2]) - 15
    rows = [row for row in read_manifest(tmp_path / "out") if row["kind"] == "gif"]
    assert rows == [
        dict.fromkeys(rows[0], "")
        | {"kind": "gif", "head": "mean", "file": path.name, "threshold": "0.6", "status": "ok"}
    ]


def test_a_video_goes_in_and_comes_out(tmp_path):
    diagonal = np.full((24, 32, 3), 40, np.uint8) + np.eye(24, 32, dtype=np.uint8)[..., None] * 200
    first, *others = [Image.fromarray(np.roll(diagonal, 3 * i, 1)) for i in range(5)]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=40)
    options = {"mean": MEAN, "std": STD, "formats": ["gif", "mask"], "maps": ["mean"]}
    summary = exported(Backbone(), tmp_path / "clip.gif", tmp_path / "out", **options)
    assert summary.images == 5 and summary.files == {"gif": 1, "mask": 5}
    assert sorted(path.name for path in (tmp_path / "out").glob("*mask.png")) == [
        f"clip_{i:06}_mean_mask.png" for i in range(5)
    ]
    assert len(list((tmp_path / "out" / "frames").iterdir())) == 5
    with Image.open(tmp_path / "out" / "animation_mean.gif") as image:
        assert image.n_frames == 5 and image.info["duration"] == 40  # the video's own rate
