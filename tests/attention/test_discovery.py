"""LOST and TokenCut against their definitions, written out patch by patch with scipy's labels and its generalized
eigensolver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from vit_suite.attention.discovery import last_keys, lost, tokencut
from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone

GRIDS = [(4, 4), (7, 5), (12, 16), (15, 15)]


def some_keys(grid: tuple[int, int], count: int = 6, dim: int = 12) -> torch.Tensor:
    """Smooth over the grid, with a common part, as keys of a network are; (count, N, dim)."""
    generator = torch.Generator().manual_seed(sum(grid))
    coarse = torch.randn(count, dim, 3, 3, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, grid, mode="bicubic") + 0.3 * torch.randn(
        count, dim, *grid, generator=generator
    )
    return fine.flatten(2).transpose(1, 2) + 0.2 * torch.randn(count, 1, dim, generator=generator)


def lost_by_hand(keys: np.ndarray, grid: tuple[int, int], k: int) -> tuple[np.ndarray, int]:
    similarity = keys @ keys.T
    patches = range(len(keys))
    degrees = [sum(similarity[p, q] > 0 for q in patches if q != p) for p in patches]
    order = sorted(patches, key=lambda p: (degrees[p], p))
    seed = order[0]
    alike = [p for p in order[:k] if similarity[seed, p] > 0]
    summed = np.array([sum(similarity[p, q] for p in alike) for q in patches])
    labeled, _ = ndimage.label((summed > 0).reshape(grid))
    return labeled == labeled.ravel()[seed], seed


@pytest.mark.parametrize("grid", GRIDS)
def test_lost(grid):
    keys = some_keys(grid)
    found = lost(keys, grid)
    k = min(100, grid[0] * grid[1] // 2)
    for one, mask, seed in zip(keys, found.masks, found.seeds, strict=True):
        expected, expected_seed = lost_by_hand(one.numpy(), grid, k)
        assert int(seed) == expected_seed and mask.numpy().tolist() == expected.tolist()
    assert 0 < found.masks.double().mean() < 1 and found.masks.flatten(1).gather(1, found.seeds[:, None]).all()
    assert (found.maps[found.masks] > 0).all()


def test_losts_k_is_used_and_is_at_most_half_of_the_patches():
    keys = some_keys((12, 16))
    masks = [lost(keys, (12, 16), k).masks for k in (1, 100, 96, 1000)]
    assert not masks[0].equal(masks[1])
    assert masks[1].equal(masks[2]) and masks[2].equal(masks[3])
    expected, _ = lost_by_hand(keys[0].numpy(), (12, 16), 1)
    assert masks[0][0].numpy().tolist() == expected.tolist()


def tokencut_by_hand(keys: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    weights = np.where(units @ units.T > 0.2, 1.0, 1e-5)
    degrees = np.diag(weights.sum(1))
    vector = linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 1])[1][:, 0]
    seed = int(np.abs(vector).argmax())
    side = vector > vector.mean()
    side = side if side[seed] else ~side
    labeled, _ = ndimage.label(side.reshape(grid))
    return labeled == labeled.ravel()[seed], vector * np.sign(vector[seed]), seed


@pytest.mark.parametrize("grid", GRIDS)
def test_tokencut(grid):
    keys = some_keys(grid)
    found = tokencut(keys, grid)
    for one, mask, vector, seed in zip(keys, found.masks, found.maps, found.seeds, strict=True):
        expected, expected_vector, expected_seed = tokencut_by_hand(one.double().numpy(), grid)
        np.testing.assert_allclose(vector.flatten().numpy(), expected_vector, atol=1e-8)
        assert mask.numpy().tolist() == expected.tolist()
        assert abs(expected_vector[int(seed)]) == pytest.approx(abs(expected_vector[expected_seed]))
    assert 0 < found.masks.double().mean() < 1


@pytest.mark.parametrize("method", [lost, tokencut])
def test_a_planted_object_is_found(method):
    """Two directions of keys, object and ground, that point away from each other; the object is smaller and so the one
    that is found."""
    grid = (10, 14)
    planted = torch.zeros(grid, dtype=torch.bool)
    planted[3:7, 4:9] = True
    planted[5, 11] = True  # alike, but apart: another region
    keys = torch.where(planted.flatten()[:, None], torch.tensor([1.0, 0.2]), torch.tensor([-1.0, 0.3]))
    keys = keys + 0.05 * torch.randn(len(keys), 2, generator=torch.Generator().manual_seed(0))
    found = method(keys[None], grid)
    expected = planted.clone()
    expected[5, 11] = False
    seed = divmod(int(found.seeds[0]), grid[1])
    if seed == (5, 11):  # the smaller region may hold the seed
        expected = planted & ~expected
    assert found.masks[0].equal(expected)


def test_tokencut_without_a_cut_is_everything():
    alike = torch.tensor([1.0, 0.0]).repeat(1, 12, 1)
    different = torch.eye(12)[None]
    for keys in (alike, different):
        found = tokencut(keys, (3, 4))
        assert found.masks.all() and not found.maps.any()


BACKBONES = {
    "plain": {},
    "registers": {"registers": 3},
    "post-norm": {"norm": "post"},
    "without CLS": {"class_token": False, "pool": "mean"},
    "causal": {"causal": True},
}


@pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES.keys())
def test_keys_are_those_the_last_block_computes(options):
    torch.manual_seed(0)
    backbone = Backbone(
        BackboneConfig(patch_size=8, dim=24, depth=3, heads=3, image_size=[32, 32], drop_path=0.3, **options)
    )
    for block in backbone.vit.blocks:  # as if trained: a norm of a norm would else change nothing
        torch.nn.init.normal_(block.norm1.weight)
        torch.nn.init.normal_(block.norm2.weight)
    images = torch.randn(2, 3, 32, 40)
    seen = []
    hook = backbone.vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    backbone.eval()
    with torch.no_grad():
        backbone.tokens(images)
    hook.remove()
    backbone.train()
    keys = last_keys(backbone, images)
    assert keys.shape == (2, 20, 24) and not keys.requires_grad and backbone.training
    torch.testing.assert_close(keys, seen[0][:, backbone.prefix_tokens :, 24:48])  # of q, k, v, heads side by side


def test_keys_are_normalized_where_the_network_normalizes_them():
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(patch_size=8, dim=24, depth=1, heads=3, image_size=[32, 32]))
    backbone.vit.blocks[-1].attn.k_norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    keys = last_keys(backbone, torch.randn(1, 3, 32, 32)).unflatten(-1, (3, 8))
    torch.testing.assert_close(keys.mean(-1), torch.zeros(1, 16, 3), atol=1e-5, rtol=0)
