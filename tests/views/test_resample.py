"""Crop-resize-flip against torchvision and Pillow: the same box gives the same pixels within 2 / 255."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from vit_suite.config.limits import pair
from vit_suite.errors import UserError
from vit_suite.views.evaluate import eval_view
from vit_suite.views.resample import axis_weights, crop_resize_views

MODES = {
    "bicubic": (InterpolationMode.BICUBIC, Image.BICUBIC),
    "bilinear": (InterpolationMode.BILINEAR, Image.BILINEAR),
}
SHAPES = [((32, 32), 32), ((32, 32), 16), ((50, 37), (20, 64)), ((37, 50), 48), ((120, 90), 24)]


def crop_resize(images, boxes, flip, size, **options):
    """One crop an image: boxes (B, 4), flip (B,) or None -> (B, C, h, w)."""
    return crop_resize_views(images, boxes[:, None], None if flip is None else flip[:, None], size, **options)[0]


def random_boxes(height: int, width: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 4) boxes of every size and place, the whole image and all four corners among them."""
    rng = np.random.default_rng(seed)
    tall, wide = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    boxes = np.stack([rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1), tall, wide], 1)
    half = [height // 2, width // 2]
    special = [
        [0, 0, height, width],
        [0, 0, *half],
        [height - half[0], 0, *half],
        [0, width - half[1], *half],
        [height - half[0], width - half[1], *half],
    ][:count]
    boxes[: len(special)] = special
    return torch.from_numpy(boxes)


def noise(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """White noise: the hardest image for a resize, it overshoots everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def pillow(image: torch.Tensor, box: list[int], size: tuple[int, int], mode: int) -> torch.Tensor:
    """Pillow's crop and resize, (3, h, w) in 0..255; horizontal pass first (Pillow 13 swaps the passes of some
    shapes)."""
    top, left, tall, wide = box
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + wide, top + tall))
    picture = picture.resize((size[1], tall), mode).resize((size[1], size[0]), mode)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("method", ["dense", "single"])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_same_pixels_as_torchvision_and_pillow(shape, size, method, kernel):
    count = 40
    images, boxes, sides = noise(count, 3, *shape), random_boxes(*shape, count), pair(size)
    views = crop_resize(images, boxes, None, size, kernel=kernel, method=method)
    assert views.dtype == torch.float32 and views.shape == (count, 3, *sides)
    assert 0 <= views.min() and views.max() <= 1
    for view, image, box in zip(views, images, boxes.tolist(), strict=True):
        other = reference.resized_crop(image, *box, list(sides), interpolation=MODES[kernel][0], antialias=True)
        torch.testing.assert_close(
            view * 255, other.float(), atol=2.001, rtol=0
        )  # 2 levels, and the rounding of 1 / 255
        torch.testing.assert_close(view * 255, pillow(image, box, sides, MODES[kernel][1]), atol=2.001, rtol=0)


@pytest.mark.parametrize("method", ["dense", "single"])
def test_bilinear_without_antialias_reads_two_pixels(method):
    images, boxes = noise(8, 3, 50, 37), random_boxes(50, 37, 8)
    views = crop_resize(images, boxes, None, 16, kernel="bilinear_plain", method=method)
    for view, image, box in zip(views, images, boxes.tolist(), strict=True):
        other = reference.resized_crop(image / 255, *box, [16, 16], InterpolationMode.BILINEAR, antialias=False)
        torch.testing.assert_close(view, other, atol=1e-5, rtol=0)
    smooth = crop_resize(images, boxes, None, 16, kernel="bilinear", method=method)
    assert views.std() > 1.2 * smooth.std()  # noise that is not averaged


def test_large_photographs_take_the_sparse_path_and_agree_with_the_dense_one():
    images, boxes = noise(3, 3, 150, 211), random_boxes(150, 211, 3)
    flip = torch.tensor([True, False, True])
    sparse = crop_resize(images, boxes, flip, 64)
    assert torch.equal(sparse, crop_resize(images, boxes, flip, 64, method="single"))
    torch.testing.assert_close(sparse, crop_resize(images, boxes, flip, 64, method="dense"), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("method", ["dense", "single"])
def test_flip_mirrors_exactly_the_samples_it_names(method):
    images, boxes = noise(6, 3, 40, 33), random_boxes(40, 33, 6)
    flip = torch.tensor([True, False, False, True, True, False])
    plain = crop_resize(images, boxes, None, 24, method=method)
    mirrored = crop_resize(images, boxes, flip, 24, method=method)
    expected = torch.where(flip.view(-1, 1, 1, 1), plain.flip(-1), plain)
    torch.testing.assert_close(mirrored, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(plain[0], mirrored[0], atol=0.05)


def test_taps_stop_at_the_box_not_at_the_image():
    image = torch.zeros(1, 1, 24, 24, dtype=torch.uint8)
    image[..., 6:18, 6:18] = 100
    boxes = torch.tensor([[6, 6, 12, 12]])
    for method in ("dense", "single"):
        view = crop_resize(image, boxes, None, 5, method=method)
        torch.testing.assert_close(view, torch.full_like(view, 100 / 255), atol=1e-6, rtol=0)


def test_a_whole_box_of_the_output_size_is_the_image_itself():
    images = noise(4, 3, 20, 28)
    boxes = torch.tensor([[0, 0, 20, 28]]).expand(4, 4)
    torch.testing.assert_close(
        crop_resize(images, boxes, None, (20, 28), method="dense"), images / 255, atol=1e-6, rtol=0
    )


def test_fractional_boxes_move_the_grid():
    ramp = torch.arange(64).float().expand(1, 1, 64, 64) / 255
    low, high = (
        crop_resize(ramp, torch.tensor([[8.0, left, 32.0, 32.0]]), None, 16, method="dense") for left in (16.0, 16.5)
    )
    inner = slice(2, -2)  # away from the taps that the box cuts
    torch.testing.assert_close((high - low)[..., inner] * 255, torch.full_like(low[..., inner], 0.5), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="fractional"):
        crop_resize(ramp, torch.tensor([[8.0, 16.0, 32.0, 32.0]]), None, 16, method="single")


def test_weights_are_catmull_rom_and_sum_to_one():
    weights = axis_weights(torch.tensor([0.0]), torch.tensor([8.0]), 16, 8)[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(16))
    # Twice as large: output 7 has its center at 3.75, so pixels 2 .. 5 (centers 2.5 .. 5.5) lie at these distances.
    distance = torch.tensor([1.25, 0.25, 0.75, 1.75])
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    torch.testing.assert_close(weights[7, 2:6], torch.where(distance < 1, near, far), atol=1e-6, rtol=0)
    assert weights[7, [0, 1, 6, 7]].abs().max() == 0


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("method", ["dense", "single"])
def test_any_number_of_channels(channels, method):
    images, boxes = noise(3, channels, 30, 30), random_boxes(30, 30, 3)
    views = crop_resize(images, boxes, None, 12, method=method)
    for channel in range(channels):
        alone = crop_resize(images[:, channel : channel + 1], boxes, None, 12, method=method)
        torch.testing.assert_close(views[:, channel], alone[:, 0], atol=1 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("method", ["dense", "single"])
def test_float_images_equal_their_bytes(method):
    images, boxes = noise(4, 3, 30, 40), random_boxes(30, 40, 4)
    torch.testing.assert_close(
        crop_resize(images / 255, boxes, None, 16, method="dense"),
        crop_resize(images, boxes, None, 16, method=method),
        atol=2 / 255,
        rtol=0,
    )


def test_ragged_lists_equal_image_by_image():
    shapes = [(40, 200), (130, 60), (129, 129), (40, 190)]
    images = [noise(1, 3, *shape, seed=index)[0] for index, shape in enumerate(shapes)]
    boxes = torch.stack([random_boxes(*shape, 6, seed=index) for index, shape in enumerate(shapes)])  # (4, 6, 4)
    flip = torch.rand(4, 6) < 0.5
    for method in ("auto", "dense", "single"):  # dense pads lists into groups, as on a GPU
        views = crop_resize_views(images, boxes, flip, 32, method=method)
        assert views.shape == (6, 4, 3, 32, 32)
        for index, image in enumerate(images):
            alone = crop_resize(image.expand(6, -1, -1, -1), boxes[index], flip[index], 32, method="dense")
            torch.testing.assert_close(views[:, index], alone, atol=2 / 255, rtol=0)


def test_ragged_list_of_one_size_equals_the_batch():
    images, boxes = noise(8, 3, 32, 32), random_boxes(32, 32, 8)
    assert torch.equal(crop_resize(list(images), boxes, None, 16), crop_resize(images, boxes, None, 16))


def test_chunks_do_not_show(monkeypatch):
    images, boxes = noise(33, 3, 32, 32), random_boxes(32, 32, 33)
    whole = crop_resize(images, boxes, None, 16)
    monkeypatch.setattr("vit_suite.views.resample.CPU_CHUNK", 30000)
    assert torch.equal(crop_resize(images, boxes, None, 16), whole)


def test_autocast_does_not_reach_the_products():
    images, boxes = noise(4, 3, 32, 32), random_boxes(32, 32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_resize(images, boxes, None, 16), crop_resize(images, boxes, None, 16))
        mixed = crop_resize(images, boxes, None, 16)
    assert torch.equal(mixed, crop_resize(images, boxes, None, 16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ragged", [False, True])
def test_crops_of_a_gpu_are_those_of_a_cpu(ragged):
    images = noise(6, 3, 91, 120)
    boxes = torch.stack([random_boxes(90, 120, 6, seed) for seed in range(3)], 1)
    images = [image[:, : 90 + index % 2] for index, image in enumerate(images)] if ragged else images[:, :, :90]
    there = [image.cuda() for image in images] if ragged else images.cuda()
    flip = torch.arange(18).view(6, 3) % 2 == 0
    found = crop_resize_views(there, boxes, flip, 64).cpu()
    torch.testing.assert_close(
        found, crop_resize_views(images, boxes, flip, 64, method="dense"), atol=1 / 2 / 255, rtol=0
    )


BAD = {
    "normalized": (lambda x: (x.float() / 255 - 0.5) / 0.2, "images are float32 with values from -2"),
    "floats of 0..255": (lambda x: x.float(), "images are float32"),
    "integers": (lambda x: x.long(), "images are int64"),
    "not finite": (lambda x: x.float() / 0, "images are float32"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("ragged", [False, True])
def test_pixels_that_would_be_clamped_are_refused(kind, ragged):
    change, words = BAD[kind]
    images = change(noise(2, 3, 16, 12))
    images = list(images) if ragged else images
    boxes = torch.tensor([[[0, 0, 8, 8]]] * 2)
    for view in (
        lambda: crop_resize_views(images, boxes, None, 4),
        lambda: eval_view(images, 8, [0.5] * 3, [0.2] * 3),
    ):
        with pytest.raises(UserError, match=f"^{words}.*views take uint8"):
            view()


def test_floats_in_0_to_1_give_what_uint8_gives():
    images = noise(2, 3, 16, 12)
    boxes = torch.tensor([[[1, 2, 8, 9]]] * 2)
    whole, part = (crop_resize_views(x, boxes, None, 4, method="dense") for x in (images, images.float() / 255))
    torch.testing.assert_close(whole, part, atol=1e-6, rtol=0)
