"""The page of an export: what it holds, and what it does in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reports.browser import CHROMIUM, Browser
from vit_suite.attention.manifest import OK, read_manifest, write_manifest
from vit_suite.attention.maps import mass_mask
from vit_suite.data.pixels import Reading, parse_range
from vit_suite.data.shapes import ShapesSource
from vit_suite.errors import UserError
from vit_suite.reports import gallery
from vit_suite.reports.contact import Tile, thumbnail
from vit_suite.reports.gallery import quantized, write_gallery

NAMES = ["cat", "deep/dog", "deep/</script><b>", "fish & chips"]
SIZES = [(60, 80), (200, 100), (48, 48), (375, 500)]
GRIDS = [(6, 8), (10, 5), (4, 4), (12, 16)]


def export(folder: Path, names=NAMES, kinds=("mask", "npz"), sizes=SIZES) -> Path:
    """What `vit-suite attention` leaves: images beside the output, npz files, a manifest (masks are only named)."""
    rows, random = [], np.random.default_rng(0)
    for number, name in enumerate(names):
        size, grid = sizes[number % len(sizes)], GRIDS[number % 4]
        image = folder / "images" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
        heads = random.random((3, *grid), dtype=np.float32) ** 4
        line = {"image": str(image), "height": size[0], "width": size[1], "status": OK}
        if "npz" in kinds:
            place = folder / "out" / f"{name}_attention.npz"
            place.parent.mkdir(parents=True, exist_ok=True)
            extra = {"mean": heads.mean(0), "max": heads.max(0), "grid": grid, "image_size": size, "path": str(image)}
            np.savez(place, attention=heads, threshold=0.6, **extra)
            rows.append(line | {"kind": "npz", "file": f"{name}_attention.npz"})
        for head in ("0", "1", "2", "mean") if "mask" in kinds else ():
            rows.append(line | {"kind": "mask", "head": head, "file": f"{name}_head{head}_mask.png", "threshold": 0.6})
    rows.append({"image": "broken.jpg", "status": "the file is empty (0 bytes)"})
    rows.append({"kind": "coco", "file": "coco.json", "status": OK})
    (folder / "out").mkdir(exist_ok=True)
    write_manifest(folder / "out" / "manifest.csv", rows)
    return folder / "out"


def content(page: Path) -> dict:
    """The data in the page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def maps_of(item: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(item["maps"]), "<u2").reshape(-1, *item["grid"])


def test_principal_components_are_in_the_page(tmp_path):
    """One export for all items: as many of them as there are images, of the image's shape; a page without has none."""
    folder = export(tmp_path)
    assert not any("pca" in item for item in content(write_gallery(folder))["items"])
    rows = read_manifest(folder)
    for name, size in zip(NAMES, SIZES, strict=True):
        row = next(row for row in rows if row["kind"] == "npz" and row["file"].startswith(name))
        Image.new("RGB", size[::-1], (200, 30, 90)).save(folder / f"{name}_pca.png")
        rows.append(row | {"kind": "pca", "file": f"{name}_pca.png"})
    write_manifest(folder / "manifest.csv", rows)
    for item, size in zip(content(write_gallery(folder))["items"], SIZES, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(item["pca"].partition(";base64,")[2]))) as picture:
            assert picture.height / picture.width == pytest.approx(size[0] / size[1], rel=0.02)
            assert np.abs(np.asarray(picture.convert("RGB")).mean((0, 1)) - (200, 30, 90)).max() < 3
        assert any(title == "pca" for title, _ in item["files"])


def test_what_the_page_holds(tmp_path):
    folder = export(tmp_path)
    page = write_gallery(folder)
    assert page == folder / "index.html"
    data = content(page)
    assert data["labels"] == ["head0", "head1", "head2", "mean", "max"] and data["threshold"] == 0.6
    assert [item["name"] for item in data["items"]] == NAMES
    for item, size, grid, name in zip(data["items"], SIZES, GRIDS, NAMES, strict=True):
        assert (item["size"], item["grid"]) == (list(size), list(grid))
        stored = np.load(folder / f"{name}_attention.npz")
        expected = [*stored["attention"], stored["mean"], stored["max"]]
        for own, heat in zip(maps_of(item), expected, strict=True):
            np.testing.assert_allclose(own / own.max(), heat / heat.max(), atol=1e-5)
        kind, _, data_ = item["picture"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data_))) as picture:
            scale = min(1, 320 / max(size))
            assert (picture.height, picture.width) == (round(size[0] * scale), round(size[1] * scale))
            assert kind == ("data:image/png" if max(size) <= 96 else "data:image/jpeg")
        assert [title for title, _ in item["files"]] == [
            "npz",
            "head 0 mask",
            "head 1 mask",
            "head 2 mask",
            "mean mask",
        ]
        assert unquote(item["files"][0][1]) == f"{name}_attention.npz" and "<" not in item["files"][0][1]
    text = page.read_text()
    assert "http" not in re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)  # nothing from elsewhere
    assert text.count("</script>") == 2  # a name does not end one


def test_masks_of_the_stored_numbers_are_those_of_the_export():
    """16 bits are enough: the same patches at every threshold, but for values that are equal to 5 digits."""
    maps = torch.rand(40, 24, 32, generator=torch.Generator().manual_seed(0)) ** 8
    stored = torch.from_numpy(quantized(maps.numpy()).astype(np.float32))
    for threshold in (0.1, 0.4, 0.6, 0.9):
        different = (mass_mask(maps, threshold) != mass_mask(stored, threshold)).double().mean()
        assert different < 2e-4
    assert not quantized(np.zeros((2, 3, 3), np.float32)).any()


def test_pictures_that_have_moved_and_those_of_a_data_set(tmp_path):
    folder = export(tmp_path, ["cat"])
    os.remove(tmp_path / "images" / "0.png")
    pixels = Image.open(
        io.BytesIO(base64.b64decode(content(write_gallery(folder))["items"][0]["picture"].partition(",")[2]))
    )
    assert pixels.size == (1, 1)
    rows = [{"image": str(tmp_path / "images" / "0.png"), "kind": kind, "status": OK, "file": f"cat_{end}"}
            for kind, end in (("npz", "attention.npz"), ("overlay", "mean_overlay.png"))]  # fmt: skip
    Image.new("RGB", (80, 60), (10, 200, 30)).save(folder / "cat_mean_overlay.png")
    write_manifest(folder / "manifest.csv", rows)
    pixels = Image.open(
        io.BytesIO(base64.b64decode(content(write_gallery(folder))["items"][0]["picture"].partition(",")[2]))
    )
    assert pixels.size == (80, 60) and pixels.convert("RGB").getpixel((5, 5)) == (10, 200, 30)

    source = ShapesSource("test", 3, (48, 48))
    rows[0]["image"] = rows[1]["image"] = source.path(2)
    write_manifest(folder / "manifest.csv", rows)
    pixels = Image.open(
        io.BytesIO(base64.b64decode(content(write_gallery(folder, source))["items"][0]["picture"].partition(",")[2]))
    )
    assert np.asarray(pixels).tolist() == source.load(2).permute(1, 2, 0).tolist()


def test_pictures_are_read_as_the_export_read_them(tmp_path):
    """Floats from -5 to 5: data.value_range minmax shows them in the gallery, and on a contact sheet."""
    folder, path = export(tmp_path, ["cat"]), tmp_path / "images" / "0.npy"
    np.save(path, np.linspace(-5, 5, 32 * 32).reshape(32, 32))
    write_manifest(
        folder / "manifest.csv",
        [{"image": str(path), "kind": "npz", "status": OK, "file": "cat_attention.npz"}],
    )
    how = Reading(parse_range("minmax"))
    for reading, shades in ((how, 256), (Reading(), 1)):
        picture = content(write_gallery(folder, None, reading))["items"][0]["picture"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))
        assert len(np.unique(pixels)) == shades
        tile = np.asarray(thumbnail(Tile(str(path), reading=reading), None))
        assert len(np.unique(tile)) == shades


def test_what_no_gallery_can_be_made_of(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no manifest.csv"):
        write_gallery(tmp_path)
    with pytest.raises(UserError, match=r"needs the numbers.*--formats npz.*4 of 4 images have none, first '.*0.png'"):
        write_gallery(export(tmp_path / "masks", kinds=("mask",)))
    folder = export(tmp_path / "odd")
    np.savez(folder / "cat_attention.npz", attention=np.ones((2, 6, 8), np.float32), threshold=0.6, image_size=(60, 80))
    with pytest.raises(UserError, match="'deep/dog' has .*head2.*, others .*head0"):
        write_gallery(folder)
    assert not (folder / "index.html").exists()
    monkeypatch.setattr("vit_suite.reports.gallery.MOST", 1000)
    with pytest.raises(UserError, match="export fewer images"):
        write_gallery(export(tmp_path / "large"))


# In the browser
# -----------------------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")

LIT = """(canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, cell = canvas.width / %d;
  let dark = 0;
  for (let y = cell / 2; y < canvas.height; y += cell) for (let x = cell / 2; x < canvas.width; x += cell)
    dark += pixels[4 * (Math.floor(y) * canvas.width + Math.floor(x)) + 3] > 100;
  return canvas.width * canvas.height / cell / cell - dark;
})(document.querySelectorAll("%s canvas")[0])"""
"""How many patches of a canvas are not darkened, read from its pixels: patches a row, where."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_gallery(export(tmp_path_factory.mktemp("gallery")))


@pytest.fixture(scope="module")
def window():
    with Browser() as one:
        yield one


@pytest.fixture
def browser(window, page):
    window.open(page)
    window.wait("document.querySelectorAll('.card canvas').length === 4")
    window.settle()
    yield window
    assert window.complaints() == []


def middle(browser: Browser, selector: str) -> tuple[float, float, float]:
    """x and y of the middle of an element, and its width."""
    box = f"document.querySelector({selector!r}).getBoundingClientRect()"
    return tuple(browser.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2, r.width])({box})"))


def patches(page: Path, image: int, label: int, share: float) -> int:
    """How many patches the mask of an image has, from the data in the page."""
    return int(
        mass_mask(torch.from_numpy(maps_of(content(page)["items"][image])[label].astype(np.float32)), share).sum()
    )


@needs_browser
def test_the_slider_redraws_masks(browser, page, tmp_path):
    assert browser.run("document.querySelectorAll('.card').length") == 4
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run(LIT % (8, ".card")) == patches(page, 0, 3, 0.6)
    browser.screenshot(tmp_path / "before.png")
    x, y, width = middle(browser, "#threshold")
    browser.mouse("Moved", x + 0.1 * width, y)
    browser.mouse("Pressed", x + 0.1 * width, y)
    for step in (0.0, -0.1, -0.2, -0.3):
        browser.mouse("Moved", x + step * width, y)
    browser.mouse("Released", x - 0.3 * width, y)
    browser.settle()
    share = int(browser.run("document.getElementById('share').textContent").rstrip("%"))
    assert 10 <= share <= 30
    for image in range(4):
        drawn = browser.run(LIT % (GRIDS[image][1], f'.card[data-index="{image}"]'.replace('"', '\\"')))
        assert drawn == patches(page, image, 3, share / 100) < patches(page, image, 3, 0.6), image
    browser.screenshot(tmp_path / "after.png")
    before, after = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("before.png", "after.png")
    )
    assert after[120:].mean() < before[120:].mean() - 1  # less is lit, in what a person sees


@needs_browser
def test_heads_on_hover_and_click(browser, page):
    x, y, width = middle(browser, ".card .view")
    browser.mouse("Moved", x - 0.45 * width, y)
    browser.settle()
    assert browser.run("document.querySelector('.badge').textContent") == "head 0"
    assert browser.run(LIT % (8, ".card")) == patches(page, 0, 0, 0.6) != patches(page, 0, 3, 0.6)
    browser.mouse("Moved", x, 5)
    browser.settle()
    assert browser.run("document.querySelector('.badge') === null") and browser.run(LIT % (8, ".card")) == patches(
        page, 0, 3, 0.6
    )
    browser.click(x, y)
    assert (
        browser.run("document.getElementById('dialog').open")
        and browser.run("document.getElementById('title').textContent") == "cat"
    )
    assert browser.run("document.querySelectorAll('.panel').length") == 5
    x, y, _ = middle(browser, ".panel:nth-child(2)")
    browser.click(x, y)
    assert browser.run(LIT % (8, "#big")) == patches(page, 0, 1, 0.6) == browser.run(LIT % (8, ".card"))
    assert f"mask of head 1: {patches(page, 0, 1, 0.6)} patches" in browser.run(
        "document.getElementById('facts').textContent"
    )
    link = "document.querySelector('#files a').getAttribute('href')"
    assert browser.run(link) == "cat_attention.npz"
    x, y, _ = middle(browser, "#close")
    browser.click(x, y)
    assert not browser.run("document.getElementById('dialog').open")


@needs_browser
def test_keyboard(browser, page):
    def selected() -> int:
        return browser.run("Number(document.querySelector('.selected').dataset.index)")

    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowUp", 0), ("ArrowLeft", 0)):
        browser.key(key)
        assert selected() == place
    browser.key("2")
    assert browser.run(LIT % (8, ".card")) == patches(page, 0, 2, 0.6)
    browser.key("]")
    browser.key("]")
    assert browser.run(LIT % (8, ".card")) == patches(page, 0, 4, 0.6)
    browser.key("m")
    browser.key("+")
    assert browser.run(LIT % (8, ".card")) == patches(page, 0, 3, 0.65)
    browser.key("v")
    assert browser.run("document.querySelector('#modes [aria-pressed=true]').textContent") == "heat"
    assert browser.run("document.querySelector('.card canvas').width") == 8  # a pixel a patch
    assert browser.run("getComputedStyle(document.querySelector('.card canvas')).display") == "block"
    browser.key("v")  # the picture alone: the heat map is gone
    assert browser.run("getComputedStyle(document.querySelector('.card canvas')).display") == "none"
    browser.key("Enter")
    browser.key("ArrowRight")
    assert browser.run("document.getElementById('title').textContent") == "deep/dog"
    browser.key("Escape")
    assert not browser.run("document.getElementById('dialog').open") and selected() == 1
    browser.key("/")
    for letter in "DEEP":
        browser.key(letter)
    browser.settle()
    assert browser.run("document.getElementById('filter').value") == "DEEP"  # letters are no commands there
    assert browser.run("document.getElementById('count').textContent") == "2 of 4 images"
    assert browser.run("[...document.querySelectorAll('.card')].filter(card => card.offsetParent).length") == 2
    browser.key("Enter")
    browser.key("ArrowRight")
    assert selected() == 2 and browser.run("document.querySelector('.selected').title") == "deep/</script><b>"


@needs_browser
def test_only_cards_near_the_window_are_drawn(window, tmp_path):
    window.open(write_gallery(export(tmp_path, [f"image {number:03d}" for number in range(120)], ("npz",), SIZES[2:3])))
    window.wait("document.querySelectorAll('.card canvas').length > 0")
    drawn = window.run("document.querySelectorAll('.card canvas').length")
    assert drawn < 90 and window.run("document.querySelectorAll('.card').length") == 120
    assert window.run("document.querySelector('.card[data-index=\"119\"] canvas') === null")
    window.run("window.scrollTo(0, document.body.scrollHeight)")
    window.wait("document.querySelector('.card[data-index=\"119\"] canvas') !== null")
    window.wait("document.querySelector('.card[data-index=\"0\"] canvas') === null")
    assert window.complaints() == []


def test_a_folder_called_like_a_placeholder(tmp_path):
    folder = tmp_path / "a@DATA@b@TITLE@"
    folder.mkdir()
    gallery._write(tmp_path / "page.html", folder, iter([]))
    page = (tmp_path / "page.html").read_text()
    assert page.count("Attention: a@DATA@b@TITLE@") == 2 and page.rstrip().endswith("</html>")
