"""The views of a GPU, made on a CPU: crops and colors of all sizes together give those of the code for a CPU."""

import dataclasses

import pytest
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from vit_suite.config import ViewsConfig
from vit_suite.data.packed import Packed, packed
from vit_suite.views import planes
from vit_suite.views.draw import alone
from vit_suite.views.multicrop import MultiCrop, draw_views, image_sizes, recolor_
from vit_suite.views.planes import Group, Planes, crop_planes
from vit_suite.views.planes_color import normalized, recolor_planes_
from vit_suite.views.resample import crop_resize_views

SHAPES = [(40, 200), (130, 60), (129, 129), (40, 190), (20, 20), (300, 40)]
SIZES = [(32, 32), (16, 16), (20, 27)]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ALL = ViewsConfig(
    global_size=32, local_size=16, local_crops=3, jitter=0.8, gray=0.3, blur=[1, 0.5, 0.5], solarize=[0.3] * 3
)


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def groups(shapes: list[tuple[int, int]], fractional: bool = False) -> list[Group]:
    """Two random views of each size of images of these shapes."""
    generator, found = torch.Generator().manual_seed(0), []
    sides = torch.tensor(shapes).double().unsqueeze(1)  # (B, 1, 2)
    for size in SIZES:
        lengths = 1 + torch.rand(len(shapes), 2, 2, generator=generator) * (sides - 1)
        starts = torch.rand(len(shapes), 2, 2, generator=generator) * (sides - lengths)
        boxes = torch.cat([starts, lengths], -1)
        flip = torch.rand(len(shapes), 2, generator=generator) < 0.5
        found.append(Group(boxes if fractional else boxes.floor().long(), flip, size))
    return found


def views_of(found: Planes) -> list[torch.Tensor]:
    """(V, B, C, h, w) of each size."""
    return [group.permute(1, 2, 0, 3, 4) for group in found.groups()]


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "bilinear_plain"])
@pytest.mark.parametrize("kind", ["uint8", "float", "fractional", "chunks"])
def test_crops_of_a_batch_are_those_of_a_cpu(kind, kernel, monkeypatch):
    if kind == "chunks":
        monkeypatch.setattr(planes, "CHUNK", 200_000)
    images, wanted = noise((5, 3, 50, 37)), groups([(50, 37)] * 5, kind == "fractional")
    images = images / 255 if kind == "float" else images
    for found, group in zip(views_of(crop_planes(images, wanted, kernel)), wanted, strict=True):
        one_by_one = crop_resize_views(images, group.boxes, group.flip, group.size, kernel, method="dense")
        torch.testing.assert_close(found, one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chunk", [1 << 30, 300_000])
def test_crops_of_images_of_many_sizes_are_those_of_each_image(channels, chunk, monkeypatch):
    monkeypatch.setattr(planes, "CHUNK", chunk)
    images = [noise((channels, *shape), seed) for seed, shape in enumerate(SHAPES)]
    wanted = groups(SHAPES)
    for found, group in zip(views_of(crop_planes(images, wanted)), wanted, strict=True):
        for index, image in enumerate(images):
            boxes, flip = group.boxes[index : index + 1], None if group.flip is None else group.flip[index : index + 1]
            alone_ = crop_resize_views(image[None], boxes, flip, group.size, method="dense")
            torch.testing.assert_close(found[:, index], alone_[:, 0], atol=1e-5, rtol=0)


def test_a_large_image_among_small_ones_has_a_bucket_of_its_own():
    sizes = [(375, 500)] * 60 + [(500, 375)] * 30 + [(200 + 40 * step, 300) for step in range(20)] + [(3000, 4000)]
    found = planes._buckets(sizes)
    assert len(found) <= planes.MOST_BUCKETS and sorted(sum(found.values(), [])) == list(range(len(sizes)))
    assert [members for members in found.values() if len(sizes) - 1 in members] == [[len(sizes) - 1]]
    for (height, width), members in found.items():
        assert all(sizes[index][0] <= height and sizes[index][1] <= width for index in members)
    padded = sum(height * width * len(members) for (height, width), members in found.items())
    assert padded < 1.6 * sum(height * width for height, width in sizes)


@pytest.mark.parametrize("channels", [3, 1, 2])
@pytest.mark.parametrize("sides", [(32, 16), (33, 17)])  # odd sides have pieces of one pixel
def test_colors_of_all_sizes_are_those_of_each_size(channels, sides):
    cfg = dataclasses.replace(ALL, global_size=sides[0], local_size=sides[1])
    images = noise((24, channels, 40, 40))
    crop = MultiCrop(cfg, [0.0] * channels, [1.0] * channels)
    sizes = crop.sizes(draw_views(cfg, image_sizes(images), alone(24)))
    together = crop_planes(images, [Group(drawn.boxes, drawn.flip, size) for drawn, size in sizes])
    apart = [views.flatten(0, 1).clone() for views in views_of(together)]
    recolor_planes_(together, [drawn for drawn, _ in sizes])
    for x, (drawn, _), found in zip(apart, sizes, views_of(together), strict=True):
        before = x.clone()
        recolor_(x, drawn)
        torch.testing.assert_close(found.flatten(0, 1), x, atol=2e-5, rtol=0)
        assert (x - before).abs().mean() > 0.05


def test_normalized_views_are_those_of_a_cpu():
    images = noise((6, 3, 40, 48))
    crop = MultiCrop(ALL, MEAN, STD)
    drawn = draw_views(ALL, image_sizes(images), alone(6))
    sizes = crop.sizes(drawn)
    found = crop_planes(images, [Group(drawn.boxes, drawn.flip, size) for drawn, size in sizes])
    recolor_planes_(found, [drawn for drawn, _ in sizes])
    views = [view for group in normalized(found, MEAN, STD) for view in group]
    for one, other in zip(views, crop.apply(images, drawn), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the 11 bits that TF32 multiplies (to the nearest, ties away from zero, as the hardware does)."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_tf32_moves_a_pixel_by_less_than_the_tolerance(monkeypatch):
    images = noise((8, 3, 120, 90))
    crop = MultiCrop(dataclasses.replace(ALL, jitter=0.0, solarize=[0.0] * 3), [0.0] * 3, [1.0] * 3)
    sizes = crop.sizes(draw_views(crop.cfg, image_sizes(images), alone(8)))
    wanted = [Group(drawn.boxes, drawn.flip, size) for drawn, size in sizes]
    plain, plain_blur = crop_planes(images, wanted), crop_planes(images, wanted)
    recolor_planes_(plain_blur, [drawn for drawn, _ in sizes])
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: product(tf32(one.contiguous()), tf32(other.contiguous())))
    rounded, blurred = crop_planes(images, wanted), crop_planes(images, wanted)
    moved = (rounded.pixels - plain.pixels).abs().max() * 255
    assert 0.01 < moved < 0.25
    recolor_planes_(blurred, [drawn for drawn, _ in sizes])
    assert (blurred.pixels - plain_blur.pixels).abs().max() * 255 < 0.5


def test_a_list_is_sent_by_one_copy_and_read_where_it_lies():
    whole = noise((3 * (40 * 30 + 20 * 50),))
    shapes = [torch.Size((3, 40, 30)), torch.Size((3, 20, 50))]
    images = Packed(whole, shapes)
    sent = move_data_to_device([images, torch.arange(2)], torch.device("meta"))[0]  # Lightning's
    assert isinstance(sent, Packed) and [image.shape for image in sent] == shapes
    assert sent[0].is_meta and packed(sent, slack=50) is sent and images.to(torch.device("cpu")) is images
    here = packed(list(images), slack=7)
    assert torch.equal(here.pixels[:-7], whole) and not here.pixels[-7:].any()
    assert all(torch.equal(one, other) for one, other in zip(here, images, strict=True))
