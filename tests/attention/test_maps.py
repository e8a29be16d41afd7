from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vit_suite.attention.maps import (
    artifacts,
    attention_maps,
    cls_attention,
    look,
    mass_mask,
    max_map,
    mean_map,
    rolled_out,
    upsample,
    winning_head,
    without_artifacts,
)
from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone


def test_cls_attention_takes_the_cls_row_behind_the_prefix():
    attention = torch.arange(2 * 2 * 9 * 9, dtype=torch.float32).view(2, 2, 9, 9)
    maps = cls_attention(attention, 3, (2, 3))
    assert maps.shape == (2, 2, 2, 3)
    assert maps[1, 0].flatten().equal(attention[1, 0, 0, 3:])
    assert cls_attention(attention[:, :, :1], 3, (2, 3)).equal(maps)  # the first row is enough


def test_cls_attention_refuses_what_does_not_fit():
    attention = torch.zeros(1, 2, 10, 10)
    with pytest.raises(ValueError, match="4x3 grid"):
        cls_attention(attention, 1, (4, 3))
    with pytest.raises(ValueError, match="grid"):
        cls_attention(attention[:, :, :2], 1, (3, 3))
    with pytest.raises(ValueError, match="CLS token"):
        cls_attention(attention, 0, (2, 5))


def test_mass_mask_by_hand():
    heat = torch.tensor([[0.1, 0.2], [0.3, 0.4]])  # ascending cumulative mass: 0.1 0.3 0.6 1.0
    assert mass_mask(heat, 0.6).tolist() == [[False, False], [True, True]]
    assert mass_mask(heat, 0.75).tolist() == [[False, True], [True, True]]
    assert mass_mask(heat, 0.3).tolist() == [[False, False], [False, True]]
    assert mass_mask(heat * 17, 0.6).equal(mass_mask(heat, 0.6))
    assert mass_mask(heat, 1.0).all()
    assert not mass_mask(torch.zeros(2, 2)).any()


def test_mass_mask_is_the_smallest_set_that_holds_the_mass():
    maps = torch.rand(3, 4, 7, 5, generator=torch.Generator().manual_seed(0)) ** 3
    for threshold in (0.2, 0.6, 0.9):
        mask = mass_mask(maps, threshold)
        share = (maps * mask).sum((-2, -1)) / maps.sum((-2, -1))
        least = torch.where(mask, maps, torch.inf).amin((-2, -1))
        assert (share >= threshold - 1e-6).all()
        assert (share - least / maps.sum((-2, -1)) < threshold).all()  # without its smallest patch it no longer does
        assert (torch.where(mask, 0, maps).amax((-2, -1)) <= least).all()


def test_equal_patches_are_taken_deterministically():
    mask = mass_mask(torch.full((2, 4, 4), 0.25), 0.5)
    assert mask[0].equal(mask[1])
    assert mask[0].flatten().tolist() == [False] * 8 + [True] * 8 or int(mask[0].sum()) == 9  # 0.5 + rounding


def test_mean_and_max_map():
    maps = torch.tensor([[[[1.0, 3.0]], [[0.2, 0.2]]]])
    assert torch.allclose(mean_map(maps), torch.tensor([[[0.6, 1.6]]]))
    assert torch.allclose(max_map(maps), torch.tensor([[[0.5, 0.75]]]))


def test_nearest_upsampling_repeats_patches_and_fits_any_size():
    heat = torch.arange(6.0).view(2, 3)
    assert upsample(heat, (4, 9)).equal(heat.repeat_interleave(2, 0).repeat_interleave(3, 1))
    odd = upsample(heat, (5, 7))
    assert odd.shape == (5, 7)
    assert odd[:, 0].tolist() == [0, 0, 3, 3, 3] and odd[0].tolist() == [
        0,
        0,
        1,
        1,
        1,
        2,
        2,
    ]  # the middle row's center is on the seam
    assert upsample(heat, (1, 1)).tolist() == [[4]]  # smaller than the grid: the patch under the center
    mask = heat > 2
    assert upsample(mask, (4, 6)).dtype == torch.bool


def test_bilinear_upsampling():
    heat = torch.arange(12.0).view(1, 2, 2, 3)
    smooth = upsample(heat, (8, 12), "bilinear")
    assert smooth.shape == (1, 2, 8, 12)
    torch.testing.assert_close(smooth.mean((-2, -1)), heat.mean((-2, -1)))
    assert smooth[0, 0, 0, 0] == 0 and smooth[0, 1, -1, -1] == 11
    with pytest.raises(ValueError, match="bilinear"):
        upsample(heat > 2, (8, 12), "bilinear")
    with pytest.raises(ValueError, match="nearest or bilinear"):
        upsample(heat, (8, 12), "cubic")


class Tiny(torch.nn.Module):
    patch_size, heads, prefix_tokens, has_cls = 4, 2, 3, True

    def last_attention(self, images, rows):
        assert not self.training and not torch.is_grad_enabled()
        tokens = self.prefix_tokens + images[0, 0].numel() // 16
        return torch.arange(float(tokens)).expand(len(images), self.heads, tokens, tokens)


def test_attention_maps_of_a_backbone():
    backbone = Tiny().train()
    maps = attention_maps(backbone, torch.zeros(5, 3, 8, 12))
    assert maps.shape == (5, 2, 2, 3) and maps[4, 1].flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert backbone.training
    backbone.has_cls = False  # registers alone
    with pytest.raises(UserError, match="no CLS token"):
        attention_maps(backbone, torch.zeros(1, 3, 8, 8))


def test_the_winner_is_the_head_that_gives_most_of_its_own_mass():
    maps = torch.tensor([[[9.0, 1.0, 0.0]], [[0.1, 0.3, 0.0]]])  # shares 0.9 0.1 0 and 0.25 0.75 0
    assert winning_head(maps).tolist() == [[0, 1, 0]]
    assert winning_head(torch.stack([maps, maps.flip(0)])).tolist() == [[[0, 1, 0]], [[1, 0, 0]]]


def test_rollout_by_hand():
    first = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    last = torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    eye = torch.eye(3)
    product = (0.5 * last + 0.5 * eye) @ (0.5 * first + 0.5 * eye)  # the paper's recursion, all rows
    rolled = rolled_out([first[None], last[None]])
    torch.testing.assert_close(rolled, product[:1])
    assert not torch.allclose(rolled_out([last[None], first[None]]), rolled)  # the order of the blocks matters
    torch.testing.assert_close(rolled.sum(-1), torch.ones(1))


@pytest.fixture(scope="module", params=["pre", "post"])
def backbone(request):
    torch.manual_seed(0)
    cfg = BackboneConfig(
        patch_size=4, dim=16, depth=3, heads=2, registers=2, image_size=[16, 16], drop_path=0.0, norm=request.param
    )
    made = Backbone(cfg).eval()
    with torch.no_grad():
        for weights in made.parameters():
            weights.add_(0.3 * torch.randn_like(weights))  # attention of a fresh network is nearly uniform
    return made


@torch.no_grad()
def test_look_reads_every_block(backbone):
    images = torch.randn(2, 3, 8, 12)
    looked = look(backbone, images, rollout=True, norms=True)
    x, grid = backbone.embed(images)
    product = torch.eye(x.shape[1])
    for index, block in enumerate(backbone.vit.blocks):
        attention = backbone.attention_of(index, x, grid)  # (B, h, T, T)
        product = (0.5 * attention.mean(1) + 0.5 * torch.eye(x.shape[1])) @ product
        x = block(x)
    torch.testing.assert_close(looked.rollout, product[:, 0, 3:].unflatten(-1, grid))
    torch.testing.assert_close(looked.heads, attention[:, :, 0, 3:].unflatten(-1, grid))
    torch.testing.assert_close(looked.norms, x[:, 3:].norm(dim=-1).unflatten(-1, grid))
    plain = look(backbone, images)
    torch.testing.assert_close(plain.heads, looked.heads)
    assert plain.rollout is None and plain.norms is None


def test_artifacts_are_patches_far_above_the_median():
    norms = torch.full((2, 3, 4), 10.0)
    norms[0, 1, 2], norms[0, 0, 0], norms[1, 2, 3] = 35, 19, 21
    found = artifacts(norms, 2.0)
    assert found.nonzero().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert artifacts(norms * 7, 2.0).equal(found)  # the scale of the network does not matter


def test_artifacts_get_the_median_of_their_neighbours():
    maps = torch.arange(24.0).view(1, 2, 3, 4)
    found = torch.zeros(1, 3, 4, dtype=torch.bool)
    found[0, 1, 1] = True
    clean = without_artifacts(maps.clone(), found)
    around = torch.tensor([0.0, 1, 2, 4, 6, 8, 9, 10])
    assert clean[0, 0, 1, 1] == around.median() and clean[0, 1, 1, 1] == around.median() + 12
    assert clean[~found[:, None].expand_as(maps)].equal(maps[~found[:, None].expand_as(maps)])
    found[0, 0, :] = found[0, 1, :] = True  # two rows: the upper one sees only the lower one's new values
    clean = without_artifacts(maps, found)
    assert clean[0, 0].min() >= 8 and not clean.isnan().any()
    assert without_artifacts(maps[:, 0], found).equal(clean[:, 0])
    assert without_artifacts(maps, torch.ones_like(found)).equal(maps)


def test_a_single_image_is_refused_in_words():
    with pytest.raises(UserError, match=r"expected images \(B, C, H, W\), not \(3, 32, 32\); for a single image give"):
        attention_maps(SimpleNamespace(has_cls=True), torch.zeros(3, 32, 32))
