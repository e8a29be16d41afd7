"""trainer.compile: the numbers of a training that is not compiled, few graphs, names and copies as before, and what it
refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from vit_suite import DINO, SiT, SupervisedViT
from vit_suite.config import (
    BackboneConfig,
    DINOConfig,
    SiTConfig,
    SiTViewsConfig,
    SupervisedConfig,
    SupervisedViewsConfig,
    TrainerConfig,
    ViewsConfig,
)
from vit_suite.errors import UserError
from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.methods.base import Method
from vit_suite.methods.compiled import check_compile, compile_blocks
from vit_suite.views.draw import alone

BATCH = 4


def dino(depth: int = 2, drop_path: float = 0.0, **method) -> DINO:
    torch.manual_seed(0)
    method = DINOConfig(out_dim=32, hidden_dim=16, bottleneck_dim=8, **method)
    return DINO(
        method, backbone(depth, drop_path), ViewsConfig(global_size=32, local_size=16, local_crops=2), batch_size=BATCH
    )


def sit() -> SiT:
    torch.manual_seed(0)
    return SiT(SiTConfig(contrastive="info_nce"), backbone(2), SiTViewsConfig(global_size=32), batch_size=BATCH)


def supervised() -> SupervisedViT:
    torch.manual_seed(0)
    return SupervisedViT(
        SupervisedConfig(ema=0.9), backbone(2), SupervisedViewsConfig(global_size=32), batch_size=BATCH, classes=4
    )


def backbone(depth: int, drop_path: float = 0.0) -> BackboneConfig:
    return BackboneConfig(patch_size=8, dim=32, depth=depth, heads=2, drop_path=drop_path)


def losses(module: Method, steps: int = 2) -> list[float]:
    """Of some steps on the same noise."""
    generator = torch.Generator().manual_seed(1)
    sides = [32, 32, 16, 16] if isinstance(module, DINO) else [32, 32] if isinstance(module, SiT) else [32]
    crops = [torch.randn(BATCH, 3, side, side, generator=generator) for side in sides]
    optimizer, found = module.train().configure_optimizers(), []
    module.max_steps = steps
    for step in range(steps):
        values = module.losses(crops, torch.arange(BATCH), alone(BATCH, epoch=step))
        loss = values["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.use_sums(values.sums)
        module.after_step(step)
        found.append(float(loss))
    return found


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Graphs of other tests count among those of a function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Graphs as they are found, which then run as they are: compiling them takes tens of seconds. Too many are an
    error."""
    graphs, compile = [], nn.Module.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        nn.Module, "compile", lambda module, dynamic, mode: compile(module, dynamic=dynamic, backend=keep)
    )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs


def test_blocks_share_graphs(traced):
    """Drop path's rate is another in each of the blocks; torch keeps 8 graphs of a function and would run the rest as
    they are."""
    module = dino(depth=12, drop_path=0.3)
    compile_blocks(module)
    assert losses(module) == losses(dino(depth=12, drop_path=0.3))
    deep = len(traced)
    torch._dynamo.reset()
    module = dino(depth=4, drop_path=0.3)
    compile_blocks(module)
    losses(module)
    assert 0 < deep == len(traced) - deep


def test_groups_of_crops(traced):
    module = dino(depth=3, drop_path=0.3, crops_at_once=1)
    compile_blocks(module)
    assert losses(module) == losses(dino(depth=3, drop_path=0.3, crops_at_once=1)) and traced


def test_a_score_between_epochs_leaves_the_graphs(traced):
    torch.backends.cuda.matmul.fp32_precision = "none"  # as torch starts
    module = dino()
    compile_blocks(module)
    losses(module)
    found = len(traced)
    knn_classify(
        torch.eye(4),
        torch.arange(4),
        torch.eye(4),
        torch.arange(4),
        options=KNNOptions(ks=[1], temperature=1.0, classes=4),
    )
    assert losses(module) and len(traced) == found > 0


def test_only_training_is_compiled_and_copies_are_free_of_it(traced):
    module = dino()
    names = list(module.state_dict())
    compile_blocks(module)
    losses(module)
    found, images = len(traced), torch.randn(3, 3, 32, 32)
    module.eval()
    features = module.evaluation_backbone()(images)
    assert len(traced) == found > 0 and list(module.state_dict()) == names
    twin = copy.deepcopy(module).train()
    assert losses(twin) and len(traced) == found
    torch.testing.assert_close(
        module.evaluation_backbone()(images), features, rtol=0, atol=0
    )  # the copy trained its own weights


@pytest.mark.slow
@pytest.mark.parametrize("make", [dino, sit, supervised])
def test_losses_are_those_of_plain_blocks(make):
    module = make()
    compile_blocks(module)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(losses(module), losses(make()), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"compile": "graphs"}, "cpu", "captures CUDA graphs, and this training is on a CPU: use blocks"),
        ({"compile": "graphs", "accumulate": 2}, "cuda", "use blocks with trainer.accumulate"),
        (
            {"compile": "blocks", "strategy": "fsdp2"},
            "cuda",
            "trainer.strategy fsdp2 gathers the parts of a block while it runs",
        ),
        ({"compile": "blocks"}, "cpu", "there is no missing-c++ here"),
        ({"compile": "blocks"}, "cuda", "there is no missing-cc or clang here"),
    ],
)
def test_refused(monkeypatch, options, kind, message):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "missing-c++")
    monkeypatch.setenv("CC", "missing-cc")
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        check_compile(TrainerConfig(**options), torch.device(kind))
    check_compile(TrainerConfig(strategy="fsdp2"), torch.device(kind))
