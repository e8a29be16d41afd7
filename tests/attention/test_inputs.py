from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from tests.attention.test_export import picture
from vit_suite.attention.video import cut_frames, is_video
from vit_suite.config import DataConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.inputs import inside, open_pictures, output_names
from vit_suite.data.lists import read_list
from vit_suite.data.registry import open_test
from vit_suite.errors import UserError


def test_names_that_differ_in_extension_or_case_alone():
    assert output_names(["a.jpg", "b.png"]) == ["a", "b"]
    assert output_names(["a.jpg", "a.png", "x/a.jpg"]) == ["a.jpg", "a.png", "x/a"]
    assert output_names(["a.jpg", "a.jpg.png", "a.png"]) == ["a.jpg", "a.jpg.png", "a.png"]
    names = output_names(["A.jpg", "a.jpg", "a.png"])
    assert len({name.lower() for name in names}) == 3


def test_long_names_are_cut_to_what_a_disk_takes(tmp_path):
    long = ["k" * 240 + ".png", "k" * 239 + "j.png", "ü" * 120 + ".png", "deep/" + "z" * 251 + ".png"]
    names = output_names([*long, "a.png"])
    assert len(set(names)) == 5 and names[4] == "a" and names[3].startswith("deep/zzz")
    for name in names:
        last = os.path.basename(name)
        assert len(last.encode()) <= 180 and last.encode().decode() == last
        path = tmp_path / f".{last}_rollout_overlay.png.abcdefgh.partial"  # as long as it is while it is written
        path.write_bytes(b"")
    assert output_names(long) == names[:4]


def test_damaged_gifs_are_no_tracebacks(tmp_path):
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[:-1500])
    if is_video(tmp_path / "a.gif"):
        cut_frames(tmp_path / "a.gif", tmp_path / "frames")
        assert 1 <= len(list((tmp_path / "frames").iterdir())) <= 3
    bomb = bytearray(content)
    bomb[6:10] = (65000).to_bytes(2, "little") * 2
    (tmp_path / "bomb.gif").write_bytes(bomb)
    assert not is_video(tmp_path / "bomb.gif")
    with pytest.raises(DecodeError, match="data.max_pixels"):
        open_pictures(tmp_path / "bomb.gif", tmp_path / "out", 3).load(0)


def test_a_video_whose_metadata_is_no_utf8(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "xxxx"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"caf\xe9"))
    assert cut_frames(path, tmp_path / "frames") == 10
    assert len(list((tmp_path / "frames").iterdir())) == 1


def test_a_list_of_paths(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "photos" / "deep er").mkdir(parents=True)
    picture(16, 24, 0).save(tmp_path / "photos" / "deep er" / "ä b.png")
    picture(16, 24, 1).save(tmp_path / "lists" / "near.jpg")
    lines = ["# a comment", "near.jpg\t3", "", "./near.jpg", "../photos/deep er/ä b.png", str(tmp_path / "gone.jpg")]
    (tmp_path / "lists" / "mine.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    pictures = open_pictures(tmp_path / "lists" / "mine.txt", tmp_path / "out", 3)
    # "near.jpg" of the list's folder, one above it, one anywhere: below what they share, and never outside the output
    assert all(not name.startswith(("/", "..")) for name in pictures.names) and len(set(pictures.names)) == 3
    assert [os.path.basename(name) for name in pictures.names] == ["near", "ä b", "gone"]
    assert pictures.load(0).shape == (3, 16, 24) and (pictures.load(1) != pictures.load(0)).any()
    with pytest.raises(DecodeError, match="does not exist"):
        pictures.load(2)


def test_names_of_a_list_stay_below_what_the_paths_share():
    assert inside(["b.jpg", "x/a.jpg"]) == ["b.jpg", "x/a.jpg"]
    assert inside(["/data/set/x/a.jpg", "/data/set/b.jpg"]) == ["x/a.jpg", "b.jpg"]
    assert inside(["../x/a.jpg", "b.jpg"]) == ["x/a.jpg", "paths/b.jpg"]
    assert inside(["/data/a.jpg"]) == ["a.jpg"]


def test_a_csv_is_read_as_a_data_set_reads_it(tmp_path):
    """--images labels.csv: the same file as for data.name list."""
    for name in ("a.png", "b c.png"):
        picture(16, 24, 0).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(
        "species;filename\ncat;a.png\ndog;b c.png\ncat;./a.png\n", encoding="utf-8-sig"
    )
    pictures = open_pictures(tmp_path / "labels.csv", tmp_path / "out", 3)
    assert list(pictures.files) == ["a.png", "b c.png"] and pictures.load(1).shape == (3, 16, 24)


def test_what_is_no_list(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00\x81" * 9)
    with pytest.raises(UserError, match="names no images"):
        read_list(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="bytes.bin' is not a readable UTF-8 list of paths"):
        open_pictures(tmp_path / "bytes.bin", tmp_path / "out", 3)


def test_a_data_set_is_split_and_index():
    source = open_test(DataConfig(name="shapes", image_size=16, test_length=12))
    pictures = open_pictures(source, None, 3)
    assert list(pictures.names[:2]) == ["test/00", "test/01"] and pictures.names[11] == "test/11"
    assert pictures.path(3) == source.path(3) and (pictures.load(3) == source.load(3).numpy()).all()


def frames(count, height=24, width=32):
    """A bright square that moves to the right."""
    for i in range(count):
        pixels = np.full((height, width, 3), (30, 60, 90), np.uint8)
        pixels[8:16, 2 * i : 2 * i + 8] = (250, 200, 40)
        yield pixels


def test_frames_of_a_gif(tmp_path):
    first, *others = [Image.fromarray(frame) for frame in frames(5)]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=40)
    first.save(tmp_path / "still.gif")
    assert is_video(tmp_path / "clip.gif") and not is_video(tmp_path / "still.gif") and not is_video(tmp_path)
    assert cut_frames(tmp_path / "clip.gif", tmp_path / "frames") == 25
    found = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in found] == [f"clip_{i:06}.png" for i in range(5)]
    for path, frame in zip(found, frames(5), strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - frame).max() < 12


def test_frames_of_an_mp4(tmp_path):
    pytest.importorskip("av")
    from vit_suite.attention.animate import write_animation

    drawn = list(frames(6))
    write_animation(tmp_path / "my clip.mp4", lambda numbers: (drawn[i] for i in numbers), 6, 12.5)
    assert is_video(tmp_path / "my clip.mp4")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "old.png").write_bytes(b"of an earlier video")
    assert cut_frames(tmp_path / "my clip.mp4", tmp_path / "frames") == 12.5
    found = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in found] == [f"my_clip_{i:06}.png" for i in range(6)]
    for path, frame in zip(found, drawn, strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - frame).mean() < 6
    (tmp_path / "no.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="no.mp4' cannot be read"):
        cut_frames(tmp_path / "no.mp4", tmp_path / "frames")
