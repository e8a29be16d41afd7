from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vit_suite.attention.render import TABLES, as_picture, heat_map, outline, overlay, scale, write_npz, write_png


def luma(colours):
    return colours.astype(float) @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize(
    ("name", "known"),
    [("viridis", [(68, 1, 84), (33, 145, 140), (253, 231, 37)]), ("inferno", [(0, 0, 4), (188, 55, 84), (252, 255, 164)])],
)
def test_colour_maps_are_matplotlibs_within_their_fit(name, known):
    table = TABLES[name]
    assert np.abs(table[[0, 128, 255]].astype(int) - np.array(known)).max() <= 5
    assert (np.diff(luma(table)) >= -0.6).all() and luma(table)[-1] > 200 > 60 > luma(table)[0]


def test_scale_and_heat_map_span_the_whole_range():
    heat = np.array([[2.0, 3.0], [4.0, 6.0]])
    assert scale(heat).tolist() == [[0, 0.25], [0.5, 1]]
    assert (heat_map(heat)[0, 0] == TABLES["inferno"][0]).all() and (heat_map(heat)[1, 1] == TABLES["inferno"][255]).all()
    assert not scale(np.full((3, 3), 7.0)).any()


def test_outline_is_the_inner_border():
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 3:8] = True
    inner = np.zeros_like(mask)
    inner[3:6, 4:7] = True
    assert (outline(mask) == (mask & ~inner)).all()
    assert not outline(np.ones((5, 5), dtype=bool)).any()


def test_overlay_brightens_attention_and_draws_the_outline():
    picture = np.full((600, 8, 3), 120, dtype=np.uint8)  # higher than one strip
    heat = np.zeros((600, 8))
    heat[300:, 4:] = 1
    drawn = overlay(picture, heat)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert luma(drawn[400, 6]) > luma(drawn[10, 0]) + 60
    assert (drawn[10, 0] == drawn[590, 0]).all() and (drawn[301, 5] == drawn[599, 7]).all()
    mask = heat > 0
    outlined = overlay(picture, heat, mask)
    changed = (outlined != drawn).any(-1)
    assert (changed == outline(mask)).all() and changed.any()


def test_pictures_of_any_channels():
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert (as_picture(image)[..., 0] == np.rint(image.mean(0))).all()
    assert as_picture(image[:1]).shape == (3, 4, 3)
    colour = np.arange(36, dtype=np.uint8).reshape(3, 3, 4)
    assert (as_picture(colour)[1, 2] == colour[:, 1, 2]).all()


def test_files_come_back_as_written(tmp_path):
    mask = np.eye(5, dtype=bool)
    write_png(tmp_path / "new" / "mask.png", mask)
    with Image.open(tmp_path / "new" / "mask.png") as image:
        assert image.mode == "L" and (np.asarray(image) == mask * 255).all()
    write_npz(tmp_path / "a.npz", attention=np.ones((2, 3), np.float32), grid=(2, 3), path="x.jpg")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert stored["grid"].tolist() == [2, 3] and str(stored["path"]) == "x.jpg"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.npz", "mask.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((2, 2), dtype=np.uint8))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        write_png(tmp_path / "a.png", np.zeros((2, 2, 7), dtype=np.uint8))
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
