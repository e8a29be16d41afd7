"""The comparison of trainings: schedules end, curves are read, and a contender's loss is one of its views."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_training

    return compare_training


def test_the_rate_rises_and_ends(compare):
    rates = [compare.rate(step, 1000, 100) for step in range(1000)]
    assert rates[49] == pytest.approx(compare.RATE) == max(rates) and rates[0] == pytest.approx(compare.RATE / 50)
    assert rates[-1] == pytest.approx(compare.LAST_RATE, abs=1e-7)
    assert all(a >= b for a, b in pairwise(rates[49:]))


def test_scores_are_read_from_a_run(compare, tmp_path):
    assert compare.scores_in(tmp_path / "metrics.csv") == []
    (tmp_path / "metrics.csv").write_text("epoch,step,knn/top1,train/loss\n0,49,,1.5\n0,99,33.5,\n1,199,35.0,\n")
    assert compare.scores_in(tmp_path / "metrics.csv") == [(1.0, 33.5), (2.0, 35.0)]


def test_minutes_are_those_of_the_process(compare):
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    assert compare.minutes_of(os.getpid()) == pytest.approx(seconds / 60, abs=0.1)


def trains(peer, views):
    """The loss of a peer falls on images of noise, and the network that is scored moves."""
    from PIL import Image

    noise = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8).numpy()
    crops = [torch.stack(same) for same in zip(*(peer.views(Image.fromarray(image)) for image in noise), strict=True)]
    assert len(crops) == views and crops[0].shape == (8, 3, 32, 32)
    before = peer.scored.blocks[0].attn.qkv.weight.clone()
    optimizer = torch.optim.AdamW([p for p in peer.trained.parameters() if p.requires_grad], lr=1e-3)
    first = float(peer.loss(crops).detach())
    for _ in range(5):
        optimizer.zero_grad()
        peer.loss(crops).backward()
        optimizer.step()
        peer.after(0.5)
    assert float(peer.loss(crops).detach()) < first and not torch.equal(peer.scored.blocks[0].attn.qkv.weight, before)


@pytest.mark.parametrize(("name", "views"), [("lightly_dino", 6), ("lightly_simclr", 2)])
def test_a_peer_trains_the_network_that_is_scored(compare, name, views):
    pytest.importorskip("lightly")
    torch.manual_seed(0)
    trains(getattr(compare, name)(), views)


def test_the_official_code_needs_its_checkout(compare, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_training.py", "--data.root", ".", "--peers", "official-dino"])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2 and "needs --official, a checkout" in capsys.readouterr().err


def test_the_network_of_a_peer_is_scored_as_its_own(compare):
    torch.manual_seed(0)
    scorer, vit = object.__new__(compare.Scorer), compare.timm_vit().eval()
    scorer.backbone = compare.Backbone(compare.BackboneConfig(**compare.NETWORK)).eval()
    scorer.backbone.vit.load_state_dict(vit.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(scorer.backbone(images), vit(images), atol=1e-5)
