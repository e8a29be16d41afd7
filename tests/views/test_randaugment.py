"""RandAugment: each operation beside Pillow's as timm calls it, how often what is applied, and the same on any number
of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP

from vit_suite.config import SupervisedViewsConfig
from vit_suite.views import randaugment
from vit_suite.views.draw import Draw, alone
from vit_suite.views.randaugment import SETS, Context, randaugment_

TIMM = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
ORIGINAL = {
    "posterize": "Posterize",
    "solarize": "Solarize",
    "color": "Color",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
}
FILL = [0.5, 0.4, 0.3]


def photograph(side: int = 48) -> np.ndarray:
    """Smooth uint8 (side, side, 3), no two channels alike, that does not use the whole range."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray((random.random((7, 7, 3)) * 150 + 40).astype(np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def apply(name: str, kind: str, level: float, x: torch.Tensor) -> torch.Tensor:
    operations = SETS[kind].plain | SETS[kind].directed
    return operations[name](x, level, Context(FILL, torch.full((len(x), 2), 0.5)))


def timms(name: str, level: float, picture: np.ndarray, monkeypatch) -> np.ndarray:
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value if level > 0 else -value)
    arguments = LEVEL_TO_ARG[name](abs(level) * 10, {"translate_pct": 0.45}) if LEVEL_TO_ARG[name] else ()
    fill = tuple(round(255 * value) for value in FILL)
    return np.asarray(
        NAME_TO_OP[name](Image.fromarray(picture), *arguments, fillcolor=fill, resample=Image.Resampling.BILINEAR)
    )


CASES = [
    (name, level) for name in TIMM for level in (0.3, 0.9, -0.9) if level > 0 or name in SETS["increasing"].directed
]


@pytest.mark.parametrize(("name", "level"), CASES)
def test_operations_are_timms(name, level, monkeypatch):
    picture = photograph()
    ours = apply(name, "increasing", level, as_tensor(picture))[0].permute(1, 2, 0).numpy() * 255
    theirs = timms(TIMM[name], level, picture, monkeypatch).astype(np.float64)
    compare(name, ours, theirs)


@pytest.mark.parametrize("name", list(ORIGINAL))
def test_original_operations_are_timms_without_inc(name, monkeypatch):
    picture = photograph()
    ours = apply(name, "original", 0.8, as_tensor(picture))[0].permute(1, 2, 0).numpy() * 255
    compare(name, ours, timms(ORIGINAL[name], 0.8, picture, monkeypatch).astype(np.float64))


@pytest.mark.parametrize("kind", list(SETS))
def test_posterizing_keeps_a_bit_at_every_strength(kind):
    x = as_tensor(photograph(16))
    assert all(apply("posterize", kind, level / 20, x).max() >= 0.5 for level in range(21))


def compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal within a level or two, at the pixels that both took from the picture; edges of moved images are blended
    differently."""
    error = np.abs(ours - theirs).max(-1)
    if name in randaugment.MOVES:
        inside = error < 3
        assert inside.mean() > 0.93, f"{name}: {100 * inside.mean():.1f}% agree"
        assert (
            np.abs(ours[:3, :3].mean((0, 1)) - theirs[:3, :3].mean((0, 1))).max() < 12
        )  # the corner: the same side is filled
    elif name == "posterize":  # Pillow drops bits, torchvision scales: values between the same two cuts
        assert error.max() <= 1 + 256 / 2
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    else:
        limit = {"sharpness": 3.5, "contrast": 2, "equalize": 4}.get(name, 1.6)
        assert error[1:-1, 1:-1].max() <= limit, f"{name}: {error.max()}"


@pytest.mark.parametrize("kind", list(SETS))
def test_every_strength_of_every_operation_works(kind):
    x = as_tensor(photograph(16)).repeat(2, 1, 1, 1)
    for name in SETS[kind].plain | SETS[kind].directed:
        for level in (0.0, 0.5, 1.0, *((-1.0,) if name in SETS[kind].directed else ())):
            out = apply(name, kind, level, x)
            assert out.shape == x.shape and out.dtype == x.dtype and bool(((out >= 0) & (out <= 1)).all()), (
                name,
                level,
            )
    for name in ["solarize", "translate_x", "rotate", "shear_y"]:  # no strength, no change
        level = {"increasing": 0.0, "original": 1.0}[kind] if name == "solarize" else 0.0
        torch.testing.assert_close(apply(name, kind, level, x), x, atol=1e-5, rtol=0)


def test_cutout_is_a_gray_square():
    x = torch.zeros(1, 3, 56, 56)
    out = SETS["original"].plain["cutout"](x, 1.0, Context(FILL, torch.tensor([[0.5, 0.25]])))
    rows, columns = (out[0, 0] > 0).nonzero().unbind(1)
    assert (len(rows), int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (
        20 * 20,
        18,
        37,
        4,
        23,
    )
    assert torch.allclose(out[out > 0], torch.tensor(128 / 255))
    edge = SETS["original"].plain["cutout"](x, 1.0, Context(FILL, torch.tensor([[0.0, 0.0]])))
    assert int((edge[0, 0] > 0).sum()) == 10 * 10


def noise(count: int, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layers", "probability", "changed"), [(1, 0.5, 0.5), (2, 0.5, 0.75), (2, 1.0, 1.0), (2, 0.0, 0.0)]
)
def test_how_many_images_change(layers, probability, changed):
    cfg = SupervisedViewsConfig(randaugment=layers, randaugment_probability=probability)
    x = noise(1500)
    out = randaugment_(x.clone(), alone(1500), cfg, FILL)
    share = (out != x).flatten(1).any(1).float().mean().item()
    assert abs(share - changed) < 0.05  # autocontrast of the whole range changes nothing, rarely


def test_operations_and_directions_are_drawn_evenly(monkeypatch):
    seen: dict[tuple[str, bool], int] = {}

    def counting(name):
        def operation(x, level, context):
            seen[name, level < 0] = seen.get((name, level < 0), 0) + len(x)
            return x

        return operation

    plain, directed = SETS["increasing"]
    fake = type(SETS["increasing"])({n: counting(n) for n in plain}, {n: counting(n) for n in directed})
    monkeypatch.setitem(randaugment.SETS, "increasing", fake)
    randaugment_(noise(6000, 1), alone(6000), SupervisedViewsConfig(randaugment=1, randaugment_probability=1.0), FILL)
    assert sum(seen.values()) == 6000 and len(seen) == len(plain) + 2 * len(directed)
    for (name, _), count in seen.items():
        assert abs(count - 400 / (2 if name in directed else 1)) < 80, (name, count)


def test_strength_has_timms_noise(monkeypatch):
    levels = []
    spy = {"spy": lambda x, level, context: levels.append(level) or x}
    monkeypatch.setitem(randaugment.SETS, "increasing", type(SETS["increasing"])(spy, {}))
    for step in range(600):
        randaugment_(
            noise(2, 1), alone(2, step=step), SupervisedViewsConfig(randaugment=1, randaugment_probability=1.0), FILL
        )
    values = 10 * torch.tensor(levels)
    assert abs(values.mean() - 9) < 0.08 and abs(values.std() - 0.5) < 0.05 and values.max() <= 10
    levels.clear()
    randaugment_(
        noise(2, 1),
        alone(2),
        SupervisedViewsConfig(randaugment=1, randaugment_probability=1.0, magnitude_std=0.0),
        FILL,
    )
    assert levels == pytest.approx([0.9])


def test_each_slice_of_the_global_batch_has_its_own_strength(monkeypatch):
    levels = []
    spy = {"spy": lambda x, level, context: levels.append(level) or x}
    monkeypatch.setitem(randaugment.SETS, "increasing", type(SETS["increasing"])(spy, {}))
    cfg = SupervisedViewsConfig(randaugment=1, randaugment_probability=1.0)
    randaugment_(noise(300, 1), alone(300), cfg, FILL)
    whole = list(levels)
    assert len(set(whole)) == 3
    for part in (slice(0, 192), slice(192, 300)):
        randaugment_(noise(part.stop - part.start, 1), Draw(0, 0, 0, part, 300), cfg, FILL)
    assert levels[3:] == [whole[0], whole[1], whole[1], whole[2]]


@pytest.mark.parametrize("kind", list(SETS))
def test_ranks_augment_as_one_process_does(kind):
    cfg = SupervisedViewsConfig(randaugment_set=kind, randaugment_probability=1.0)
    x = noise(64, 16)
    whole = randaugment_(x.clone(), Draw(1, 0, 3, slice(0, 64), 64), cfg, FILL)
    parts = [
        randaugment_(x[part].clone(), Draw(1, 0, 3, part, 64), cfg, FILL) for part in (slice(0, 24), slice(24, 64))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(whole, randaugment_(x.clone(), Draw(1, 0, 4, slice(0, 64), 64), cfg, FILL))


def test_one_channel():
    x = noise(64)[:, :1].contiguous()
    out = randaugment_(x.clone(), alone(64), SupervisedViewsConfig(randaugment_probability=1.0), [0.5])
    assert out.shape == x.shape and bool(((out >= 0) & (out <= 1)).all())
