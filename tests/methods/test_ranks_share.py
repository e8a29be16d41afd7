"""What ranks send each other: no equal buffers, and no weights that are not asked for."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.methods.test_dino import make
from vit_suite import distributed
from vit_suite.methods.ddp import OrderedDDP, QuietDDP, own_statistics
from vit_suite.methods.sharding import Sharded
from vit_suite.models.batch_norm import BatchNorm1d


def test_buffers_are_broadcast_only_where_ranks_have_their_own(monkeypatch):
    assert not own_statistics(nn.Sequential(nn.Linear(2, 2), BatchNorm1d(2)))
    assert own_statistics(nn.Sequential(BatchNorm1d(2), nn.BatchNorm2d(2)))
    monkeypatch.setattr("pytorch_lightning.strategies.DDPStrategy.configure_ddp", lambda self: None)
    for module, broadcast in ((make(), False), (nn.Sequential(nn.BatchNorm1d(2)), True)):
        for strategy in (QuietDDP(), OrderedDDP()):
            monkeypatch.setattr(type(strategy), "lightning_module", module, raising=False)
            strategy.configure_ddp()
            assert strategy._ddp_kwargs["broadcast_buffers"] is broadcast


def test_only_what_is_scored_is_gathered(monkeypatch):
    """Not the student, and not the heads, for a score of the teacher's backbone."""
    module = make()
    sharded = Sharded.__new__(Sharded)
    sharded.method = module
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    sharded.twin = copy.deepcopy(module, meta)
    gathered = []
    monkeypatch.setattr(distributed, "gathered", lambda tensor: gathered.append(tensor) or tensor)
    whole = sharded.whole(["evaluation_backbone", "evaluation_head"])  # there is no head
    scored = module.evaluation_backbone()
    assert len(gathered) == len(scored.state_dict()) < len(module.state_dict()) / 2
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole.evaluation_backbone().eval()(images), scored.eval()(images), rtol=0, atol=0)
    assert all(parameter.is_meta for parameter in whole.student.parameters())
    everything = sharded.whole()
    assert not any(parameter.is_meta for parameter in everything.parameters())
