"""The evaluation view against torchvision's Resize(256) + CenterCrop(224)."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from vit_suite.views.evaluate import eval_view

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def noise(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (300, 300), (100, 177), (224, 300)])
def test_photographs_are_resized_to_256_and_cut_to_224(height, width):
    images = noise(2, height, width)
    peer = v2.Compose([v2.Resize(256, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    view = eval_view(images, 224, MEAN, STD)
    assert view.dtype == torch.float32
    torch.testing.assert_close(view, normalized(peer(images)), atol=1e-5, rtol=0)


def test_images_of_the_size_are_only_normalized():
    images = noise(3, 32, 32)
    torch.testing.assert_close(eval_view(images, 32, MEAN, STD), normalized(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(eval_view(images / 255, 32, MEAN, STD), normalized(images), atol=1e-6, rtol=0)
    wide = noise(3, 20, 32)
    torch.testing.assert_close(eval_view(wide, (20, 32), MEAN, STD), normalized(wide), atol=1e-6, rtol=0)


def test_ragged_list_equals_image_by_image():
    images = [noise(1, *shape)[0] for shape in ((50, 70), (32, 32), (90, 33))]
    views = eval_view(images, 32, MEAN, STD)
    assert views.shape == (3, 3, 32, 32)
    for view, image in zip(views, images, strict=True):
        assert torch.equal(view, eval_view(image[None], 32, MEAN, STD)[0])


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 48), (480, 640)])
def test_size_with_two_sides_is_covered(shape):
    view = eval_view(noise(1, *shape), (48, 96), [0.0] * 3, [1.0] * 3)
    assert view.shape == (1, 3, 48, 96)
    assert 0 <= view.min() and view.max() <= 1 and view.std() > 0


def test_float_images_differ_by_rounding_only():
    images = noise(2, 120, 90)
    torch.testing.assert_close(
        eval_view(images, 64, [0.0] * 3, [1.0] * 3),
        eval_view(images / 255, 64, [0.0] * 3, [1.0] * 3),
        atol=2.001 / 255,
        rtol=0,
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels):
    assert eval_view(noise(2, 50, 60, channels), 32, [0.5] * channels, [0.2] * channels).shape == (2, channels, 32, 32)
