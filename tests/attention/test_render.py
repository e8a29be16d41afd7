from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vit_suite.attention.numbers import write_npz
from vit_suite.attention.palette import INFERNO, head_colors
from vit_suite.attention.png import STORED, encode_png, write_png
from vit_suite.attention.render import as_picture, heat_map, levels, outline, overlay


def luma(colors):
    return colors.astype(float) @ [0.299, 0.587, 0.114]


def test_the_color_map_is_matplotlibs_within_its_fit():
    known = [(0, 0, 4), (188, 55, 84), (252, 255, 164)]
    assert np.abs(INFERNO[[0, 128, 255]].astype(int) - np.array(known)).max() <= 5
    assert (np.diff(luma(INFERNO)) >= -0.6).all() and luma(INFERNO)[-1] > 200 > 60 > luma(INFERNO)[0]


def test_levels_span_the_whole_range_of_each_map():
    heat = np.array([[2.0, 3.0], [4.0, 6.0]])
    assert levels(heat).tolist() == [[0, 64], [128, 255]]
    assert levels(np.stack([heat, heat * 9 + 1])).tolist() == [levels(heat).tolist()] * 2
    assert levels(heat, (0, 12)).tolist() == [[43, 64], [85, 128]] and levels(heat, (3, 4)).tolist() == [
        [0, 0],
        [255, 255],
    ]
    assert not levels(np.full((3, 3), 7.0)).any() and not levels(heat, (1, 1)).any()
    assert (heat_map(levels(heat))[0, 0] == INFERNO[0]).all() and (heat_map(levels(heat))[1, 1] == INFERNO[255]).all()


def test_heads_have_colors_of_their_own():
    colors = head_colors(24).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(24, dtype=int)
    assert distance[:8, :8].min() > 120 and distance.min() > 20
    assert (head_colors(3) == colors[:3]).all()


def test_outline_is_the_inner_border():
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 3:8] = True
    inner = np.zeros_like(mask)
    inner[3:6, 4:7] = True
    assert (outline(mask) == (mask & ~inner)).all()
    assert not outline(np.ones((5, 5), dtype=bool)).any()


def test_overlay_brightens_attention_and_draws_the_outline():
    picture = np.full((1200, 8, 3), 120, dtype=np.uint8)  # higher than one strip
    heat = np.zeros((1200, 8), np.uint8)
    heat[300:, 4:] = 255
    drawn = overlay(picture, heat)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert luma(drawn[400, 6]) > luma(drawn[10, 0]) + 60
    assert (drawn[10, 0] == drawn[1190, 0]).all() and (drawn[301, 5] == drawn[1199, 7]).all()
    mask = heat > 0
    outlined = overlay(picture, heat, mask)
    changed = (outlined != drawn).any(-1)
    assert (changed == outline(mask)).all() and changed.any()
    assert (outlined[400, 4, 2] > outlined[400, 4, 0]) and (drawn[400, 4, 2] < drawn[400, 4, 0])  # cyan on orange


def test_several_maps_at_once_are_drawn_as_one_by_one():
    rng = np.random.default_rng(0)
    picture, heat = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8), rng.integers(0, 256, (3, 90, 70), dtype=np.uint8)
    mask = heat > 100
    together = overlay(picture, heat, mask)
    for i in range(3):
        assert (together[i] == overlay(picture, heat[i], mask[i])).all() and (
            outline(mask)[i] == outline(mask[i])
        ).all()


def test_pictures_of_any_channels():
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert (as_picture(image)[..., 0] == np.rint(image.mean(0))).all()
    assert as_picture(image[:1]).shape == (3, 4, 3)
    color = np.arange(36, dtype=np.uint8).reshape(3, 3, 4)
    assert (as_picture(color)[1, 2] == color[:, 1, 2]).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 30), (200, 300)])
def test_png_files_come_back_as_written(tmp_path, shape):
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    gray, mask, index = color[..., 0].copy(), color[..., 1] > 99, color[..., 2] % 6
    assert (color.nbytes > STORED) == (shape[0] >= 200)
    for name, pixels, mode, expected in (
        ("c", color, "RGB", color),
        ("g", gray, "L", gray),
        ("m", mask, "L", mask * 255),
    ):
        write_png(tmp_path / "new" / f"{name}.png", pixels)
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            image.verify()
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            assert image.mode == mode and (np.asarray(image) == expected).all()
    write_png(tmp_path / "new" / "i.png", index, head_colors(6))
    with Image.open(tmp_path / "new" / "i.png") as image:
        assert image.mode == "P" and (np.asarray(image) == index).all()
        assert (np.asarray(image.convert("RGB")) == head_colors(6)[index]).all()
    assert len(list((tmp_path / "new").iterdir())) == 4


def test_png_replaces_and_refuses(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((30, 30), dtype=np.uint8))
    write_png(tmp_path / "a.png", np.ones((2, 2), dtype=np.uint8))
    assert (tmp_path / "a.png").read_bytes() == encode_png(np.ones((2, 2), dtype=np.uint8))
    for wrong in (np.zeros((2, 2, 7), dtype=np.uint8), np.zeros((2, 2)), np.zeros((0, 2), dtype=np.uint8)):
        with pytest.raises(ValueError, match="a PNG takes"):
            write_png(tmp_path / "a.png", wrong)
    assert (tmp_path / "a.png").read_bytes() == encode_png(np.ones((2, 2), dtype=np.uint8))


def test_npz_comes_back_as_written(tmp_path):
    write_npz(tmp_path / "new" / "a.npz", attention=np.ones((2, 3), np.float32), grid=(2, 3), path="x.jpg")
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as stored:
        assert stored["grid"].tolist() == [2, 3] and str(stored["path"]) == "x.jpg"
