"""Corruptions: laws of areas and sides beside plain loops, order, content, and what is
refused."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.config.sit import SiTConfig
from vit_suite.errors import UserError
from vit_suite.views import blocks, corruption
from vit_suite.views.corruption import corrupt
from vit_suite.views.draw import alone

BLOCKS = SiTConfig()
GMML = SiTConfig(corruption="gmml", drop_area=0.5, replace_area=0.3)
MASK = SiTConfig(corruption="mask")
ALL = [
    BLOCKS,
    dataclasses.replace(BLOCKS, color=0.5),
    GMML,
    dataclasses.replace(GMML, drop_type=["noise", "zeros"], align=4, color=0.5),
    MASK,
    dataclasses.replace(MASK, mask_rule="80/10/10"),
    SiTConfig(corruption="none"),
]
NAMES = ["blocks", "blocks-color", "gmml", "gmml-all", "mask", "80/10/10", "none"]


def ramp(views: int, images: int, height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    """Smooth views within -1 .. 1, no two pixels or images alike: what is not noise is recognized, and noise stands
    out."""
    return torch.linspace(-1, 1, views * images * channels * height * width).view(
        views, images, channels, height, width
    )


def flags(where: Tensor, x: Tensor) -> Tensor:
    """(V, B, H, W) mask spread over channels."""
    return where.unsqueeze(2).expand_as(x)


def equal_means(ours: Tensor, theirs: Tensor) -> None:
    """Means and spreads of two samples within 4.5 standard errors."""
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert (ours.mean() - theirs.mean()).abs() <= 4.5 * error + 1e-12, (ours.mean(), theirs.mean(), error)
    gap = distance(ours, theirs)
    limit = 2.2 * math.sqrt((len(ours) + len(theirs)) / (len(ours) * len(theirs)))
    assert gap < limit, f"Kolmogorov-Smirnov distance {gap:.4f}, at most {limit:.4f} expected"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    places = torch.cat([ours, theirs]).unique()
    shares = [torch.searchsorted(sample.sort().values, places, right=True) / len(sample) for sample in (ours, theirs)]
    return (shares[0] - shares[1]).abs().max().item()


# The official loops, one view at a time with Python's random numbers.


def loop_of_one(size: int) -> Tensor:
    """(H, W) of one gray, blurred or recolored block."""
    far = max(1, int(0.05 * size))
    top, left = random.randrange(0, size - far), random.randrange(0, size - far)
    height, width = random.randrange(far, size), random.randrange(far, size)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def loop_of_sum(size: int, side: list[float], area: float) -> Tensor:
    """(H, W) of blocks of noise or of another image (v1)."""
    far, budget, total = max(1, int(0.05 * size)), random.uniform(0, area) * size * size, 0
    mask = torch.zeros(size, size, dtype=torch.bool)
    while total < budget:
        top, left = random.randrange(0, size - far), random.randrange(0, size - far)
        height, width = (random.randrange(max(1, int(side[0] * size)), int(side[1] * size)) for _ in range(2))
        mask[top : top + height, left : left + width] = True
        total += (min(top + height, size) - top) * (min(left + width, size) - left)
    return mask


def loop_of_union(size: int, area: float, align: int) -> Tensor:
    """(H, W) of blocks of v3."""
    budget = random.uniform(min(0.5, area), area) * size * size
    mask = torch.zeros(size, size, dtype=torch.bool)
    while mask.sum() < budget:
        top, left = (random.randrange(0, size - align) // align * align for _ in range(2))
        height, width = (
            min(random.randrange(align, max(int(0.3 * size), align + 1)), size - start) for start in (top, left)
        )
        height, width = round(height / align) * align, round(width / align) * align
        mask[top : top + height, left : left + width] = True
    return mask


def same_law(masks: Tensor, reference: list[Tensor]) -> None:
    """Areas, extents and places of (n, H, W) bool follow those of the reference's."""
    other = torch.stack(reference)
    equal_means(masks.sum((1, 2)), other.sum((1, 2)))
    for axis in (1, 2):
        ours, theirs = masks.any(axis), other.any(axis)  # rows or columns touched
        equal_means(ours.sum(1), theirs.sum(1))
    cover, expected = masks.double().mean(0), other.double().mean(0)  # of every pixel
    error = (expected * (1 - expected) * (1 / len(masks) + 1 / len(other))).sqrt()
    assert ((cover - expected).abs() <= 5 * error + 5 / len(other)).all()


def test_one_block_follows_the_law_of_the_loop():
    random.seed(1)
    for size in (32, 9):
        uniform = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
        same_law(blocks.mask_of_one(blocks.plane_of_one(size, size), uniform), [loop_of_one(size) for _ in range(4000)])


@pytest.mark.parametrize(
    ("drop", "replace", "side"), [(0.3, 0.0, [0.05, 0.25]), (0.0, 0.3, [0.05, 0.25]), (0.6, 0.0, [0.1, 0.5])]
)
def test_areas_of_noise_and_of_replacement(monkeypatch, drop, replace, side):
    """`changed` without the gray and the blurred block is the union of the loop's blocks."""
    random.seed(2)
    monkeypatch.setattr(
        corruption, "mask_of_one", lambda plane, uniform: torch.zeros(len(uniform), 32, 32, dtype=torch.bool)
    )
    cfg = dataclasses.replace(BLOCKS, drop_area=drop, replace_area=replace, block_side=side)
    changed = corrupt(cfg, ramp(2, 1500, channels=1), alone(1500, 5), 4).changed.flatten(0, 1)
    same_law(changed, [loop_of_sum(32, side, drop or replace) for _ in range(2000)])


@pytest.mark.parametrize(
    ("size", "align", "area"), [(32, 1, 0.5), (32, 4, 0.7), (32, 8, 0.5), (40, 5, 0.3), (33, 4, 0.6)]
)
def test_areas_of_gmml(size, align, area):
    random.seed(3)
    cfg = dataclasses.replace(GMML, drop_area=area, replace_area=0.0, align=align)
    changed = corrupt(cfg, ramp(2, 1500, size, size, channels=1), alone(1500, 6), 4).changed.flatten(0, 1)
    same_law(changed, [loop_of_union(size, area, align) for _ in range(1000)])
    assert (changed.sum((1, 2)) >= min(0.5, area) * size * size).double().mean() > 0.999
    if size % align == 0:
        cells = changed.view(-1, size // align, align, size // align, align).double().mean((2, 4))
        assert ((cells == 0) | (cells == 1)).all()


def only(monkeypatch, *kept: str) -> None:
    """Leaves only some of `blocks`' kinds: gray, blur."""
    shown = corruption._Views.numbers

    def numbers(self, purpose, *shape):
        values = shown(self, purpose, *shape)
        if purpose in ("gray", "blur"):
            values[:, :4] = (
                torch.tensor([0.2, 0.3, 0.1, 0.6]) if purpose in kept else torch.tensor([0.0, 0.0, 0.0, 0.0])
            )
        return values

    monkeypatch.setattr(corruption._Views, "numbers", numbers)


def test_gray_is_the_mean_over_channels(monkeypatch):
    only(monkeypatch, "gray")
    x = ramp(2, 5)
    made = corrupt(dataclasses.replace(BLOCKS, drop_area=0.0, replace_area=0.0), x, alone(5), 4)
    top, left, bottom, right = 6, 3, 6 + 10, 3 + 19  # tolerance 1: start floor(u 31), side 1 + floor(u 31)
    expected = x.clone()
    expected[..., top:bottom, left:right] = x[..., top:bottom, left:right].mean(2, keepdim=True)
    torch.testing.assert_close(
        made.images[..., 1:, 1:], expected[..., 1:, 1:], atol=1e-6, rtol=0
    )  # the blurred block is pixel 0
    torch.testing.assert_close(made.images, expected, atol=1e-6, rtol=0)  # and a blur of one pixel is that pixel
    assert made.changed.sum((2, 3)).unique().tolist() == [10 * 19 + 1]


def plain_blur(block: Tensor, radius: int, sigma: float) -> Tensor:
    """Gaussian of a block (C, h, w) with reflect padding, as torchvision's gaussian_blur."""
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = torch.outer(taps / taps.sum(), taps / taps.sum()).expand(len(block), 1, -1, -1)
    return functional.conv2d(functional.pad(block[None], [radius] * 4, mode="reflect"), kernel, groups=len(block))[0]


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 50)])
def test_blur_is_a_gaussian_that_sees_its_block_only(height, width):
    plane, generator = blocks.plane_of_one(height, width), torch.Generator().manual_seed(1)
    x, uniform = torch.randn(200, 3, height, width, generator=generator), torch.rand(200, 6, generator=generator)
    made, compared, sizes = corruption.blurred(x, plane, uniform), 0, set()
    edges = [edge.int().tolist() for edge in plane.drawn(uniform[:, :4])]
    for index, (top, bottom, left, right) in enumerate(zip(*edges, strict=True)):
        kernel = int(uniform[index, 4] * 13) + 3
        radius, sigma = kernel // 2, 0.1 + 5 * uniform[index, 5].item()
        inside = made[index, :, top:bottom, left:right]
        assert inside.isfinite().all()
        sizes.add(2 * radius + 1)
        if min(bottom - top, right - left) <= radius:
            continue  # there is no reflect padding of more pixels than the block has
        torch.testing.assert_close(
            inside, plain_blur(x[index, :, top:bottom, left:right], radius, sigma), atol=1e-5, rtol=0
        )
        compared += 1
    assert compared > 80 and sizes == {3, 5, 7, 9, 11, 13, 15}


def test_blur_of_a_narrow_block_reflects_as_often_as_it_takes():
    axis, flat = blocks.Axis(8, 7, 1, 8), torch.full((1, 15), 1 / 15)
    for first, length in ((0, 1), (2, 2), (3, 3), (1, 5)):
        matrix = corruption.blur_matrix(
            axis, torch.tensor([float(first)]), torch.tensor([float(first + length)]), flat
        )[0]
        wave = list(range(length)) + list(range(length - 2, 0, -1))  # 0 1 2 1 0 1 2 1 ..
        for place in range(first, first + length):
            expected = torch.zeros(8)
            for tap in range(-7, 8):
                expected[first + wave[(place - first + tap) % len(wave)]] += 1 / 15
            torch.testing.assert_close(matrix[place], expected)


def test_later_corruptions_lie_over_earlier_ones():
    """Gray under blur under noise under another image: with noise, then others, over nearly everything nothing else
    shows."""
    x = ramp(2, 40)
    partner = x[:, alone(40).partners()]
    most = {"block_side": [0.3, 0.6]}
    noise = corrupt(dataclasses.replace(BLOCKS, drop_area=1.0, replace_area=0.0, **most), x, alone(40), 4)
    both = corrupt(dataclasses.replace(BLOCKS, drop_area=1.0, replace_area=1.0, **most), x, alone(40), 4)
    kept = corrupt(dataclasses.replace(BLOCKS, drop_area=0.0, replace_area=1.0, **most), x, alone(40), 4)
    plain = corrupt(dataclasses.replace(BLOCKS, drop_area=0.0, replace_area=0.0, **most), x, alone(40), 4)
    noisy = (noise.images != plain.images).all(2)
    swapped = (kept.images == partner).all(2)
    assert noisy.double().mean() > 0.2 and swapped.double().mean() > 0.2
    assert (noisy & plain.changed).any() and (swapped & noisy).any()  # they do overlap
    assert torch.equal(both.images[flags(swapped, x)], partner[flags(swapped, x)])
    alone_noise = noisy & ~swapped
    assert torch.equal(both.images[flags(alone_noise, x)], noise.images[flags(alone_noise, x)])
    rest = ~noisy & ~swapped
    assert torch.equal(both.images[flags(rest, x)], plain.images[flags(rest, x)])
    for made in (noise, both, kept, plain):
        assert torch.equal(made.images[flags(~made.changed, x)], x[flags(~made.changed, x)])
    values = noise.images[flags(noisy, x)].double()
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05 and values.abs().max() > 3


def test_blur_sees_the_gray_block():
    """Channels of a pixel blurred from inside of a gray block alone are equal."""
    x = torch.randn(1, 400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = corrupt(dataclasses.replace(BLOCKS, drop_area=0.0, replace_area=0.0), x, alone(400), 4)
    gray = blocks.mask_of_one(blocks.plane_of_one(32, 32), alone(400).uniform(1, 4, purpose="corruption: gray")[:, 0])
    blur = blocks.mask_of_one(
        blocks.plane_of_one(32, 32), alone(400).uniform(1, 6, purpose="corruption: blur")[:, 0, :4]
    )
    inside = (blur & ~gray).sum((1, 2)) == 0  # blurred blocks that lie in the gray one
    assert inside.sum() > 5
    spread = made.images[0].std(1)
    assert spread[inside][gray[inside]].max() < 1e-5 and torch.equal(made.changed[0], gray | blur)


def test_gmml_drops_or_replaces():
    count = 3000
    x = ramp(1, count, 16, 16)
    made = corrupt(dataclasses.replace(GMML, drop_type=["noise", "zeros"]), x, alone(count, 1), 4)
    where = flags(made.changed, x)
    partner = x[:, alone(count).partners()]
    assert torch.equal(made.images[~where], x[~where])
    kinds = [((made.images == other) | ~where).flatten(2).all(2)[0] for other in (partner, torch.zeros_like(x))]
    noise = ~kinds[0] & ~kinds[1]
    for kind in (*kinds, noise):  # three outcomes, equally likely
        assert abs(kind.double().mean() - 1 / 3) < 4.5 * math.sqrt(2 / 9 / count)
    values = made.images[0, noise][where[0, noise]]
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    area = made.changed[0].double().mean((1, 2))
    assert area[~kinds[0]].min() >= 0.5 and area[~kinds[0]].max() < 0.62
    assert area[kinds[0]].min() >= 0.3 and area[kinds[0]].max() < 0.42


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.5),
        ({"replace_area": 0.0}, 0.0),
        ({"drop_area": 0.0}, 1.0),
        ({"drop_type": []}, 1.0),
    ],
)
def test_share_of_views_that_gmml_replaces(changes, share):
    x = ramp(2, 500, 16, 16)
    made = corrupt(dataclasses.replace(GMML, **changes), x, alone(500, 2), 4)
    replaced = (
        ((made.images == x[:, alone(500).partners()]) | ~flags(made.changed, x)).flatten(2).all(2).double().mean()
    )
    assert abs(replaced - share) <= 4.5 * math.sqrt(share * (1 - share) / 1000)
    assert made.changed.flatten(2).any(2).all()


def test_recolored_blocks():
    x = torch.randn(2, 800, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for base in (BLOCKS, dataclasses.replace(GMML, drop_type=["zeros"])):
        plain = corrupt(base, x, alone(800), 4)
        made = corrupt(dataclasses.replace(base, color=0.25), x, alone(800), 4)
        touched = (made.images != plain.images).any(2)
        assert abs(touched.flatten(2).any(2).double().mean() - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 1600)
        assert torch.equal(made.changed, plain.changed | touched)
        random.seed(4)
        same_law(touched[touched.flatten(2).any(2)], [loop_of_one(16) for _ in range(2000)])
        for view, image in touched.flatten(2).any(2).nonzero()[:50].tolist():
            before, after = (value.images[view, image][:, touched[view, image]].double() for value in (plain, made))
            for channel in range(3):
                if before[channel].std() > 0.1:
                    gain, shift = torch.linalg.lstsq(
                        torch.stack([before[channel], torch.ones(before.shape[1]).double()], 1), after[channel]
                    ).solution.tolist()
                    assert 0.5 - 1e-4 <= gain <= 1.5 + 1e-4 and -0.5 - 1e-4 <= shift <= 0.5 + 1e-4
                    torch.testing.assert_close(after[channel], before[channel] * gain + shift, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("ratio", "count"), [(0.15, 10), (0.75, 48), (0.01, 1), (0.99, 63)])
def test_mask_hides_an_exact_number_of_patches(ratio, count):
    x = ramp(2, 300)
    made = corrupt(dataclasses.replace(MASK, mask_ratio=ratio), x, alone(300), 4)
    assert made.hidden.shape == (2, 300, 64) and (made.hidden.sum(2) == count).all()
    assert torch.equal(made.images, x)
    cells = made.changed.view(2, 300, 8, 4, 8, 4)
    assert torch.equal(cells, made.hidden.view(2, 300, 8, 1, 8, 1).expand_as(cells))
    share = made.hidden.double().mean((0, 1))  # every patch as often as every other
    assert (share - count / 64).abs().max() < 4.5 * math.sqrt(count / 64 * (1 - count / 64) / 600) + 1e-9


@pytest.mark.parametrize(("ratio", "said"), [(0.0, "none"), (0.007, "none"), (0.999, "all"), (1.0, "all")])
def test_mask_that_hides_no_patch_or_every_patch_is_refused(ratio, said):
    with pytest.raises(UserError, match=rf"method.mask_ratio: {ratio:g} of 64 patches hides {said} of them"):
        corrupt(dataclasses.replace(MASK, mask_ratio=ratio), ramp(2, 4), alone(4), 4)


def test_berts_rule_hides_replaces_and_keeps():
    x = ramp(2, 1000, 24, 32)
    made = corrupt(dataclasses.replace(MASK, mask_ratio=0.5, mask_rule="80/10/10"), x, alone(1000), 8)
    cells = [
        value.unflatten(-2, (3, 8)).unflatten(-1, (4, 8)).transpose(-2, -3) for value in (made.changed, made.images, x)
    ]
    chosen = cells[0].flatten(-2).all(-1).flatten(2)
    assert torch.equal(cells[0].flatten(-2).any(-1).flatten(2), chosen) and (chosen.sum(2) == 6).all()
    same = (cells[1] == cells[2]).flatten(-2).all(-1).all(2).flatten(2)
    other = (cells[1] == cells[2][:, alone(1000).partners()]).flatten(-2).all(-1).all(2).flatten(2)
    assert (same | other).all() and not (other & (made.hidden | ~chosen)).any() and not (made.hidden & ~chosen).any()
    for kind, share in ((made.hidden, 0.8), (other, 0.1), (chosen & same & ~made.hidden, 0.1)):
        assert abs(kind[chosen].double().mean() - share) < 4.5 * math.sqrt(share * (1 - share) / 12000)
