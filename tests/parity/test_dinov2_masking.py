"""Block masks against the statistics of DINOv2's MaskingGenerator and of its collate function.

The numbers are random, so a row of the table says how many standard errors of the difference the two are apart; 5 is
the limit, as the fixture's README suggests.
"""

from __future__ import annotations

import torch

from vit_suite.views.draw import alone
from vit_suite.views.masks import ATTEMPTS, GROUP, Spread, block_masks, draw_block_masks, places_of, targets_of

from .golden import largest_error, load_golden, record

FIXTURE, SIGMAS = "dinov2_masking", 5
DRAWS = 2000


def sigmas(ours: torch.Tensor, golden: torch.Tensor, spread: torch.Tensor, draws: int, golden_draws: int) -> float:
    """Largest |difference| in standard errors, of means over draws with the standard deviation `spread`."""
    error = spread.double() * (1 / draws + 1 / golden_draws) ** 0.5
    distance = (ours.double() - golden.double()).abs()
    return float(torch.where(distance == 0, 0, distance / error.clamp(min=1e-12)).max())


def masks_of(grid: tuple[int, int], target: int, draws: int, seed: int) -> torch.Tensor:
    numbers = torch.rand(draws, ATTEMPTS, 4, generator=torch.Generator().manual_seed(seed))
    return block_masks(numbers, torch.full((draws,), target), grid)


def test_blocks():
    hyper, tensors = load_golden(FIXTURE)
    for name in ("gridA", "gridB"):
        side = hyper[name]["img"] // hyper[name]["patch"]
        golden_draws = hyper["draws"]
        for index, ratio in enumerate(hyper["ratios"]):
            golden = {
                key.removeprefix(f"{name}_"): value[index] for key, value in tensors.items() if key.startswith(name)
            }
            target = int(side * side * ratio)
            record(FIXTURE, "target", largest_error(float(target), golden["target"]), 0)
            masks = masks_of((side, side), target, DRAWS, seed=index)
            counts = masks.sum(-1).double()
            assert int(counts.max()) <= target
            off = sigmas(counts.mean(), golden["count_mean"], golden["count_std"], DRAWS, golden_draws)
            record(FIXTURE, "mean count (standard errors)", off, SIGMAS)
            share = golden["full_share"]
            pooled = (share + (counts == target).double().mean()) / 2
            off = sigmas((counts == target).double().mean(), share, (pooled * (1 - pooled)).sqrt(), DRAWS, golden_draws)
            record(FIXTURE, "share of full masks (standard errors)", off, SIGMAS)
            maps = masks.unflatten(1, (side, side)).double()
            pairs = (maps[:, :, :-1] * maps[:, :, 1:]).sum() / maps[:, :, :-1].sum()
            record(FIXTURE, "masked right neighbours", largest_error(pairs, golden["adjacent"]), 2e-2)
            pooled = (golden["coverage"] + maps.mean(0)) / 2
            off = sigmas(maps.mean(0), golden["coverage"], (pooled * (1 - pooled)).sqrt(), DRAWS, golden_draws)
            record(FIXTURE, "coverage of each place (standard errors)", off, SIGMAS)


def test_the_search_is_long_enough():
    """With ten times the attempts, no more than 1 mask in 1,000 changes."""
    changed = total = 0
    for index, (side, ratio) in enumerate([(14, 0.5), (14, 0.1), (8, 0.3), (4, 0.5), (7, 0.45)]):
        numbers = torch.rand(1000, 10 * ATTEMPTS, 4, generator=torch.Generator().manual_seed(index))
        targets = torch.full((1000,), int(side * side * ratio))
        short = block_masks(numbers[:, :ATTEMPTS], targets, (side, side))
        changed += int((short != block_masks(numbers, targets, (side, side))).any(-1).sum())
        total += 1000
    assert changed <= total / 1000, changed


def test_collate():
    hyper, tensors = load_golden(FIXTURE)
    options, grid = hyper["collate"], hyper["gridA"]["img"] // hyper["gridA"]["patch"]
    spread = Spread(options["mask_probability"], *options["mask_ratio_min_max"])
    images, patches = options["images"], grid * grid
    crops = 2 * images
    number = spread.masked(0, crops)
    record(FIXTURE, "masked crops", largest_error([float(number)], tensors["collate_n_samples_masked"]), 0)
    record(FIXTURE, "edges of the ratios", largest_error(spread.edges(0, crops), tensors["collate_edges"]), 0)
    bound = sum(int(patches * edge) for edge in spread.edges(0, crops)[1:].tolist())
    record(FIXTURE, "upper bound", largest_error([float(bound)], tensors["collate_upperbound"]), 0)
    counts, masked, generator = [], [], torch.Generator().manual_seed(0)
    for _ in range(options["batches"]):
        places = places_of(torch.rand(images, 2, generator=generator))
        shares = torch.rand(images, 2, generator=generator)
        targets = targets_of(places, shares, spread.edges(0, crops), patches).flatten()
        found = block_masks(torch.rand(crops, ATTEMPTS, 4, generator=generator), targets, (grid, grid)).sum(-1)
        counts.append(found[targets > 0].sort().values)
        masked.append((found > 0).unflatten(0, (images, 2)).T.flatten())
    counts, masked, batches = torch.stack(counts).double(), torch.stack(masked).double(), options["batches"]
    mean, std = tensors["collate_sorted_count_mean"], tensors["collate_sorted_count_std"]
    record(FIXTURE, "sorted counts (standard errors)", sigmas(counts.mean(0), mean, std, batches, batches), SIGMAS)
    share = tensors["collate_position_share"]
    off = sigmas(masked.mean(0), share, torch.full_like(share, 0.5), batches, batches)
    record(FIXTURE, "share of masks at each place (standard errors)", off, SIGMAS)
    total = tensors["collate_total_mean_std"]
    off = sigmas(counts.sum(1).mean(), total[0], total[1], batches, batches)
    record(FIXTURE, "masked patches of a batch (standard errors)", off, SIGMAS)
    # The official sum adds float32 weights of 1 / count.
    record(FIXTURE, "sum of weights", largest_error([masked.sum(1).mean()], tensors["collate_weight_sum_mean"]), 1e-6)


def test_a_whole_group_has_the_official_bound():
    hyper, tensors = load_golden(FIXTURE)
    options, grid = hyper["collate"], hyper["gridA"]["img"] // hyper["gridA"]["patch"]
    if options["images"] != GROUP:  # another size of fixture: the bound of collate is for another number of images
        return
    spread = Spread(options["mask_probability"], *options["mask_ratio_min_max"])
    found = draw_block_masks(alone(GROUP), 2, (grid, grid), spread, torch.device("cpu"))
    record(FIXTURE, "upper bound of a group", largest_error([float(found.most)], tensors["collate_upperbound"]), 0)
    assert int(found.hidden.sum()) <= found.most
