"""Principal components of patch features: against scikit-free arithmetic, and as files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attention.exported import exported
from vit_suite.attention import export_worker, pca
from vit_suite.attention.pca import basis_of, border_of, sampled
from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def blob(rows: int = 8, columns: int = 10, width: int = 6, noise: float = 0.05) -> torch.Tensor:
    """An object in the middle that differs from its background in one direction; inside it two more directions."""
    generator = torch.Generator().manual_seed(0)
    patches = noise * torch.randn(rows, columns, width, generator=generator)
    patches[2:6, 3:7, 0] += 5
    patches[2:6, 3:5, 1] += 2
    patches[2:4, 3:7, 2] += 1
    return patches


@pytest.mark.parametrize("count", [200, 4])  # more and fewer patches than directions
def test_axes_are_those_of_the_singular_value_decomposition(count):
    patches = torch.randn(count, 7, generator=torch.Generator().manual_seed(1)) * torch.arange(7, 0, -1)
    basis = basis_of(patches, torch.zeros(count, dtype=torch.bool))
    expected = torch.linalg.svd(patches.double() - patches.double().mean(0), full_matrices=False).Vh[:3]
    for axis, other in zip(basis.axes, expected, strict=True):
        assert float((axis @ other).abs()) == pytest.approx(1, abs=1e-9)
        assert float(axis[axis.abs().argmax()]) > 0


def test_colors_reach_from_dark_to_bright():
    flat, border = sampled(blob(), 10**6)
    basis = basis_of(flat, border)
    colors = basis.colors(blob())
    assert colors.shape == (3, 8, 10) and colors.dtype == torch.float32
    low, high = torch.quantile(colors.flatten(1), torch.tensor([0.01, 0.99]), dim=1)
    assert low.abs().max() < 0.1 and (high - 1).abs().max() < 0.1
    inside = colors[0, 2:6, 3:7].mean() - torch.cat([colors[0, :2].flatten(), colors[0, 6:].flatten()]).mean()
    assert abs(float(inside)) > 0.5  # red is the object, or all but it


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_does_not_touch_the_border(sign):
    patches = sign * blob()
    flat, border = sampled(patches, 10**6)
    front = basis_of(flat, border, foreground=True).foreground(patches)
    truth = torch.zeros(8, 10, dtype=torch.bool)
    truth[2:6, 3:7] = True
    assert (front > 0).equal(truth)
    assert basis_of(flat, border).foreground(patches) is None


def test_patches_without_directions():
    basis = basis_of(torch.ones(5, 4), torch.zeros(5, dtype=torch.bool), foreground=True)
    assert basis.colors(torch.ones(2, 3, 4)).isfinite().all()


def test_samples_are_evenly_spaced():
    patches = torch.arange(24.0).view(4, 6, 1)
    rows, border = sampled(patches, 8)
    assert rows.flatten().tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert border.tolist() == border_of(4, 6).flatten()[::3].tolist()


# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[32, 32])).eval()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    random = np.random.default_rng(0)
    for index, size in enumerate([(40, 32), (32, 32), (24, 56), (40, 32)]):
        coarse = Image.fromarray(random.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(root / f"{index}.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_picture_of_the_size_of_its_image(backbone, folder, tmp_path):
    """One basis: the components of the folder's patches, computed here from all patches by themselves."""
    summary = exported(backbone, folder, tmp_path / "out", mean=MEAN, std=STD, formats=["pca"], precision="fp32")
    assert summary.files == {"pca": 4} and len(summary.failures) == 1
    patches = []
    for index in range(4):
        image = torch.from_numpy(pixels(folder / f"{index}.png").transpose(2, 0, 1) / 255).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            tokens = backbone.tokens(((image - mean) / std)[None])
        patches.append(tokens.patches[0].unflatten(0, tokens.grid))
    flat = torch.cat([part.flatten(0, 1) for part in patches])
    basis = basis_of(flat, torch.zeros(len(flat), dtype=torch.bool))
    for index, part in enumerate(patches):
        drawn = pixels(tmp_path / "out" / f"{index}_pca.png")
        assert drawn.shape == pixels(folder / f"{index}.png").shape
        expected = (basis.colors(part).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(drawn[4::8, 4::8].astype(int) - expected).max() <= 1


def test_alike_images_have_one_color_in_one_basis_alone(backbone, folder, tmp_path):
    """0.png beside a black image: by itself it has the whole range of colors, in the folder's basis it has less."""
    for name, basis in (("one", "folder"), ("each", "image")):
        exported(backbone, folder, tmp_path / name, mean=MEAN, std=STD, formats=["pca"], pca_basis=basis)
    together, alone = (pixels(tmp_path / name / "0_pca.png").astype(int) for name in ("one", "each"))
    assert (together != alone).any()
    assert all(alone[..., channel].max() > 245 and alone[..., channel].min() < 10 for channel in range(3))


def test_beside_attention_and_without_a_class_token(backbone, folder, tmp_path):
    both = ["pca", "overlay", "npz"]
    exported(backbone, folder, tmp_path / "both", mean=MEAN, std=STD, formats=both, precision="fp32")
    exported(backbone, folder, tmp_path / "pca", mean=MEAN, std=STD, formats=["pca"], precision="fp32")
    for index in range(4):
        one, other = (pixels(tmp_path / name / f"{index}_pca.png").astype(int) for name in ("both", "pca"))
        assert np.abs(one - other).max() <= 1  # the same features by two ways through the network
    torch.manual_seed(0)
    options = {"patch_size": 8, "dim": 24, "depth": 2, "heads": 3, "class_token": False, "pool": "mean"}
    blind = Backbone(BackboneConfig(image_size=[32, 32], **options)).eval()
    assert exported(blind, folder, tmp_path / "blind", mean=MEAN, std=STD, formats=["pca"]).files == {"pca": 4}
    with pytest.raises(UserError, match="no CLS token"):
        exported(blind, folder, tmp_path / "no", mean=MEAN, std=STD, formats=["pca", "mask"])


def test_the_background_is_black(backbone, folder, tmp_path):
    options = {"formats": ["pca"], "pca_foreground": True, "upsample": "bilinear"}
    exported(backbone, folder, tmp_path / "out", mean=MEAN, std=STD, **options)
    black = [float((pixels(tmp_path / "out" / f"{index}_pca.png") == 0).all(2).mean()) for index in range(4)]
    assert 0.1 < np.mean(black) < 0.9


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_threads_and_ranks(backbone, folder, tmp_path, workers, monkeypatch):
    """Ranks share the sample by `map_over_ranks`; here three take their turns one after the other."""
    given = {"mean": MEAN, "std": STD, "formats": ["pca"], "batch_size": 1}
    exported(backbone, folder, tmp_path / "one", workers=1, **given)

    def in_turns(function, items):
        return [function(item) for rank in range(3) for item in items[rank::3]] and [function(item) for item in items]

    monkeypatch.setattr(export_worker.distributed, "map_over_ranks", in_turns)
    exported(backbone, folder, tmp_path / "other", workers=workers, **given)
    for index in range(4):
        names = (tmp_path / name / f"{index}_pca.png" for name in ("one", "other"))
        assert len({name.read_bytes() for name in names}) == 1


def test_a_large_folder_is_sampled(backbone, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pca, "IMAGES", 2)
    seen = []
    original = export_worker.basis_of
    monkeypatch.setattr(
        export_worker, "basis_of", lambda patches, *rest: seen.append(len(patches)) or original(patches, *rest)
    )
    exported(backbone, folder, tmp_path / "out", mean=MEAN, std=STD, formats=["pca"])
    # Images 0 and 2 of 5 in sorted order: 32 x 40 and 56 x 24 pixels in patches of 8.
    assert seen == [4 * 5 + 7 * 3]


def test_unknown_basis(backbone, folder, tmp_path):
    with pytest.raises(UserError, match="unknown basis 'folders'. Did you mean 'folder'"):
        exported(backbone, folder, tmp_path / "out", mean=MEAN, std=STD, formats=["pca"], pca_basis="folders")
    assert not (tmp_path / "out").exists()
