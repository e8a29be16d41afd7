"""How many operators a GPU step of DINO launches, by part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from count_launches import Launches, count, mixed, resident, vits16

NETWORK = ("forward", "backward", "casts", "optimizer", "EMA")


@pytest.fixture(scope="module")
def launches() -> Launches:
    return count(vits16(64, width=48), 64, (mixed, resident))


def test_views_are_few_launches_and_no_copy_a_crop(launches):
    assert 50 < launches.counts["views, mixed"] <= 350
    assert 50 < launches.counts["views, resident"] <= 150
    assert launches.copies["transfer, mixed"] == 1 and launches.copies["transfer, resident"] == 0
    assert launches.copies["views, mixed"] <= 10 and launches.copies["views, resident"] <= 10


def test_the_networks_and_what_follows_them(launches):
    assert all(launches.counts[part] for part in NETWORK)
    assert sum(launches.counts[part] for part in NETWORK) <= 1600
    assert launches.operators["forward"]["_scaled_dot_product_flash_attention"] == 3 * 12
