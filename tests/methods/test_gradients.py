"""Learning from one group of crops at a time (method.crops_at_once): the numbers of the ordinary step, in less
memory."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from vit_suite.errors import UserError
from vit_suite.methods.dino import DINO, groups
from vit_suite.methods.gradients import add_gradients, with_gradients
from vit_suite.views.draw import alone

from .test_dino import Losses, data, make, train

BATCH = 4


@pytest.fixture
def offline(monkeypatch):
    """A module whose `losses` can be called without a trainer."""
    monkeypatch.setattr(DINO, "current_epoch", 0, raising=False)


def crops(local: int = 8, count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 3, size, size, generator=generator) for size in (16, 16, *[local] * count)]


def step(module: DINO, views: list[torch.Tensor], bf16: bool = False) -> tuple[dict, dict, torch.Tensor]:
    """Losses and diagnostics of a step, gradients of the student, and torch's next random number."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        values = module.losses(views, draw=alone(BATCH), logged=True)
    assert all(parameter.grad is None for parameter in module.parameters())
    values["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in module.student.named_parameters()}
    return {name: value.detach() for name, value in values.items()}, gradients, torch.rand(1)


def same(found: dict, expected: dict, digits: float) -> None:
    """Tensor by tensor, within `digits` of its largest number."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensor is None) == (found[name] is None), name
        if tensor is not None:
            torch.testing.assert_close(
                found[name],
                tensor,
                rtol=0,
                atol=digits * max(float(tensor.abs().max()), 1e-3),
                msg=f"{name}: {{}}".format,
            )


def of(module: DINO, **method) -> DINO:
    """The same module with other options of the method."""
    module = copy.deepcopy(module)
    for name, value in method.items():
        setattr(module.method, name, value)
    return module


def test_groups_have_the_pixels_of_global_crops():
    def found(at_once: int, *shape: int) -> list[list[int]]:
        return [list(views) for views in groups(crops(*shape), at_once)]

    assert found(1) == [[0], [1], [2, 3, 4, 5], [6, 7]]
    assert found(2) == [[0, 1], [2, 3, 4, 5, 6, 7]]
    assert found(1, 12, 2) == [[0], [1], [2], [3]]  # a whole 12 x 12 crop has 144 of the 256 pixels
    assert found(1, 24, 2) == [[0], [1], [2], [3]]
    assert found(3, 16, 2) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("method", [{}, {"koleo_weight": 0.5, "norm_last_layer": False}])
@pytest.mark.parametrize("local", [8, 12])
def test_the_same_losses_and_gradients(offline, at_once, method, local):
    """Drop path included: a group drops what it drops among all crops of its size."""
    module, views = make(drop_path=0.5, method=method), crops(local)
    whole, parts = step(of(module), views), step(of(module, crops_at_once=at_once), views)
    same(parts[0], whole[0], 2e-6)
    same(parts[1], whole[1], 2e-6)
    assert parts[2] == whole[2]  # neither touches the generator
    if method:
        assert len({*parts[0]} & {"loss", "dino", "koleo", "kl", "feature_std"}) == 5
        assert not torch.isclose(parts[0]["loss"], parts[0]["dino"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16(offline, checkpointing):
    """Groups share autocast's copies of the weights; the backward pass is outside autocast, as that of the ordinary
    step is."""
    module, views = make(drop_path=0.5, method={"koleo_weight": 0.1}), crops()
    whole = step(of(module), views, bf16=True)
    module = of(module, crops_at_once=1)
    module.student.backbone.cfg.checkpointing = checkpointing
    within = []
    module.student.backbone.vit.norm.weight.register_hook(
        lambda gradient: within.append(torch.is_autocast_enabled("cpu"))
    )
    parts = step(module, views, bf16=True)
    same(parts[0], whole[0], 1e-5)
    same(parts[1], whole[1], 2e-2)
    assert parts[2] == whole[2] and within == [False] * 5  # four groups and Lightning's


class Gradients(pl.Callback):
    """The student's gradients at each optimizer step, before clipping."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = module.student.named_parameters()
        self.found.append(
            {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in named}
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_a_trainer(tmp_path, accumulate):
    """Lightning's accumulation, clipping, and the frozen last layer see what they see without groups."""
    runs = []
    for at_once in (None, 1):
        module = make(
            drop_path=0.5,
            method={"crops_at_once": at_once, "freeze_last_layer_epochs": 1},
            optim={"clip": 0.1, "lr": 1e-3},
        )
        gradients, losses = Gradients(), Losses()
        train(module, data(accumulate), tmp_path, callbacks=[gradients, losses], accumulate_grad_batches=accumulate)
        runs.append((gradients.found, losses.values))
    (whole, expected), (parts, found) = runs
    same(parts[0], whole[0], 5e-6)
    assert len(parts) == 6 and all(
        all(tensor is not None for name, tensor in step.items() if "weight_g" not in name) for step in parts
    )
    assert found == pytest.approx(expected, abs=1e-4) and len(set(found)) == 6


def peak(module: DINO, views: list[torch.Tensor]) -> int:
    """The most numbers that were kept for a backward pass at one time; weights do not count."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, list[int]] = {}  # storage -> how many operations keep it, its size
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor):
            nonlocal most
            self.tensor, self.place = tensor, tensor.untyped_storage().data_ptr()
            kept.setdefault(self.place, [0, tensor.untyped_storage().nbytes() // 4 * (self.place not in weights)])[
                0
            ] += 1
            most = max(most, sum(size for _, size in kept.values()))

        def __del__(self):
            kept[self.place][0] -= 1
            if not kept[self.place][0]:
                del kept[self.place]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda keeper: keeper.tensor):
        values = module.losses(views)
    values["loss"].backward()
    del values
    assert not kept
    return most


def test_one_group_is_kept_at_a_time(offline):
    module, views = (
        make(),
        [crop.repeat(16, 1, 1, 1) for crop in crops()],
    )  # a batch in which the network's gradients are few numbers
    whole, two, one = (peak(of(module, crops_at_once=at_once), views) for at_once in (None, 2, 1))
    assert two < 0.6 * whole  # of 2 x 17 + 6 x 5 = 64 tokens 34
    assert one < 0.4 * whole  # and 20: four local crops


def test_the_loss_can_be_looked_at_without_gradients(offline):
    module = make(method={"crops_at_once": 1})
    with torch.no_grad():
        loss = module.losses(crops())["loss"]
    torch.testing.assert_close(loss, module.losses(crops())["loss"].detach())
    assert not loss.requires_grad


def test_sums_of_gradients():
    """A parameter that no term has gets none; one tensor that autograd gives to two of them stays apart."""
    a, b, unused = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    gradients: dict = {}
    for _ in range(2):
        add_gradients(gradients, (a + b).square().sum(), [a, b, unused])
    loss = with_gradients(torch.tensor(5.0), gradients)
    (loss / 4).backward()
    assert loss == 5 and unused.grad is None
    assert a.grad.tolist() == b.grad.tolist() == [2.0, 4.0]  # 2 terms x 2 (a + b) / 4
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_batch_norm_needs_all_crops():
    with pytest.raises(
        UserError, match="method.head_batch_norm takes statistics over all crops, and method.crops_at_once"
    ):
        make(method={"crops_at_once": 1, "head_batch_norm": True})


def test_sharded_weights_need_all_crops(monkeypatch):
    monkeypatch.setattr(DINO, "device_mesh", object())
    with pytest.raises(
        UserError, match="trainer.strategy fsdp2 averages the gradients of one backward pass, and method.crops_at_once"
    ):
        make(method={"crops_at_once": 1}).configure_model()
