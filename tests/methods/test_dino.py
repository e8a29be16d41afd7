"""DINO as a module under a Trainer: what reaches the loss, what is updated when, what survives. Numbers are in
tests/parity."""

from __future__ import annotations

import copy
import math

import pytest
import pytorch_lightning as pl
import torch

from vit_suite.config import BackboneConfig, DataConfig, DINOConfig, OptimConfig, ViewsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.losses.dino import dino_loss
from vit_suite.losses.koleo import koleo_loss
from vit_suite.methods.collapse import CollapseMonitor
from vit_suite.methods.dino import DINO
from vit_suite.views.draw import alone

VIEWS = ViewsConfig(global_size=16, local_size=8, local_crops=3)


def make(
    seed: int = 0,
    drop_path: float = 0.0,
    method: dict | None = None,
    optim: dict | None = None,
    views: ViewsConfig = VIEWS,
) -> DINO:
    torch.manual_seed(seed)
    return DINO(
        DINOConfig(**{"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "momentum_teacher": 0.9} | (method or {})),
        BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, drop_path=drop_path),
        views,
        OptimConfig(**{"lr": 1e-2, "warmup_epochs": 1} | (optim or {})),
        batch_size=16,
    )


def data(accumulate: int = 1) -> ImageDataModule:
    return ImageDataModule(DataConfig(name="shapes", image_size=16, length=48, batch_size=16), accumulate=accumulate)


def train(module: DINO, source, tmp_path, epochs: int = 2, callbacks=(), ckpt_path=None, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
            "callbacks": list(callbacks),
        }
        | options
    )
    trainer.fit(module, source, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def crops(seed: int = 0, batch: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]


def close(first: torch.nn.Module, second: torch.nn.Module, **tolerance) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def offline(monkeypatch):
    """A module whose `losses` can be called without a trainer."""
    monkeypatch.setattr(DINO, "current_epoch", 0, raising=False)


def test_every_crop_reaches_the_loss(offline):
    module = make()
    views = crops()
    reference = module.losses(views)["loss"].item()
    for index in range(len(views)):
        changed = [view.clone() for view in views]
        changed[index][0] += 1.0
        assert abs(module.losses(changed)["loss"].item() - reference) > 1e-6, f"crop {index} does not reach the loss"


def test_every_crop_has_a_gradient(offline):
    module = make()
    views = [view.requires_grad_() for view in crops()]
    module.losses(views)["loss"].backward()
    norms = [float(view.grad.norm()) for view in views]
    assert all(norm > 0 for norm in norms)


def test_koleo_is_of_both_global_crops(offline):
    module = make(method={"koleo_weight": 0.5})
    values = module.losses(crops(), logged=True)
    expected = sum(koleo_loss(view) for view in module.student.features(crops())[:2])  # DINOv2's: not their mean
    torch.testing.assert_close(values["koleo"], expected)
    torch.testing.assert_close(values["loss"], values["dino"] + 0.5 * expected)
    torch.testing.assert_close(values["kl"], values["dino"].detach() - values["teacher_entropy"])


def test_no_gradient_reaches_the_teacher(offline):
    module = make()
    module.losses(crops())["loss"].backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    assert all(parameter.grad is not None for parameter in module.student.parameters() if parameter.requires_grad)


def test_losses_change_nothing(offline):
    """Asked twice for the same crops they answer the same, and only a step moves the center and the monitor."""
    module = make(drop_path=0.5)
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(0)
    first, second = (module.losses(crops(), draw=alone(4), logged=True) for _ in range(2))
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)
    torch.testing.assert_close(first.sums, second.sums, rtol=0, atol=0)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))  # nor torch's numbers
    assert module.monitor.__dict__ == CollapseMonitor(module.method.out_dim).__dict__ and not module.sums
    logits = module.teacher(crops()[:2])
    module.use_sums(first.sums)
    torch.testing.assert_close(module.center, 0.1 * logits.mean((0, 1)))  # the center's momentum is 0.9


def test_teacher_has_no_drop_path_and_student_has():
    module = make(drop_path=0.5)
    assert any("DropPath" in type(part).__name__ for part in module.student.modules())
    assert not any("DropPath" in type(part).__name__ for part in module.teacher.modules())
    # the gain of the last layer is trained or not for the student as asked, never for the teacher
    free = make(method={"norm_last_layer": False})
    assert (
        free.student.head.last_layer.weight_g.requires_grad and not free.teacher.head.last_layer.weight_g.requires_grad
    )


def test_fit_refuses_different_twins(tmp_path):
    module = make()
    with torch.no_grad():
        module.teacher.backbone.vit.cls_token += 1
    with pytest.raises(RuntimeError, match="start with different"):
        train(module, data(), tmp_path)


class Watch(pl.Callback):
    """Recomputes the teacher from the student after every optimizer step and counts the steps at which it agrees."""

    def __init__(self):
        self.steps = self.moved = 0

    def on_train_start(self, trainer, module):
        self.teacher = copy.deepcopy(module.teacher)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.steps:
            close(module.teacher, self.teacher, atol=0, rtol=0)  # in the middle of an accumulated step nothing moves
            return
        momentum = 1 - 0.05 * (1 + math.cos(math.pi * self.steps / trainer.estimated_stepping_batches))
        for ours, student in zip(self.teacher.parameters(), module.student.parameters(), strict=True):
            ours.data.mul_(momentum).add_(student.data, alpha=1 - momentum)
        close(module.teacher, self.teacher, atol=1e-6, rtol=1e-5)
        assert float(module.center.norm()) > 0 and not module.sums
        self.steps += 1


def test_ema_and_center_move_once_an_optimizer_step(tmp_path):
    for accumulate in (1, 2):
        watch = Watch()
        train(make(), data(accumulate), tmp_path, callbacks=[watch], accumulate_grad_batches=accumulate)
        assert watch.steps == 6


def test_accumulation_gives_the_numbers_of_the_whole_batch(tmp_path):
    whole, halves = make(), make()
    train(whole, data(1), tmp_path)
    train(halves, data(2), tmp_path, accumulate_grad_batches=2)
    torch.testing.assert_close(whole.center, halves.center, atol=1e-5, rtol=1e-4)
    # Adam turns rounding in near-zero gradients into steps of lr, so a few entries may differ by more
    for name, ours in whole.student.state_dict().items():
        errors = (ours - halves.student.state_dict()[name]).abs()
        assert float((errors > 1e-4).double().mean()) < 0.02 or "qkv.bias" in name, name


class Losses(pl.Callback):
    """The loss that is logged at each optimizer step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.values.append(float(trainer.logged_metrics["train/loss"]))


def test_the_logged_loss_is_that_of_the_whole_batch(tmp_path):
    """Drop path included: micro-batches drop what the whole batch drops."""
    traces = []
    for accumulate in (1, 2, 4):
        watch = Losses()
        train(make(drop_path=0.5), data(accumulate), tmp_path, callbacks=[watch], accumulate_grad_batches=accumulate)
        traces.append(watch.values)
    assert len(traces[0]) == 6 and len(set(traces[0])) == 6
    for trace in traces[1:]:
        assert trace[0] == pytest.approx(traces[0][0], abs=1e-5) and trace == pytest.approx(traces[0], abs=2e-4)


def test_what_compares_images_is_said_when_gradients_are_accumulated(tmp_path, caplog):
    options = {"koleo_weight": 0.1, "head_batch_norm": True}
    said = (
        "trainer.accumulate 2: BatchNorm, KoLeo: over the 8 images of a micro-batch, so the loss is not that of the"
        " whole batch of 16"
    )
    with caplog.at_level("WARNING", "vit_suite"):
        train(make(method=options), data(), tmp_path)
        train(make(), data(2), tmp_path, accumulate_grad_batches=2)
        assert "micro-batch" not in caplog.text
        train(make(method=options), data(2), tmp_path, accumulate_grad_batches=2)
    assert said in [record.getMessage() for record in caplog.records]


def test_last_layer_stands_still_in_its_frozen_epochs(tmp_path):
    class Last(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_epoch_end(self, trainer, module):
            self.weights.append(module.student.head.last_layer.weight_v.detach().clone())

    last, module = Last(), make(method={"freeze_last_layer_epochs": 1})
    start = module.student.head.last_layer.weight_v.detach().clone()
    train(module, data(), tmp_path, callbacks=[last])
    assert torch.equal(last.weights[0], start)  # not even decayed
    assert not torch.equal(last.weights[1], start)


def test_global_clipping_differs_from_per_tensor(tmp_path):
    one, other = make(optim={"clip": 0.01, "clip_mode": "tensor"}), make(optim={"clip": 0.01, "clip_mode": "global"})
    norms = {}

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad for p in module.student.parameters() if p.grad is not None]
            if grads:
                norms.setdefault(module.optim.clip_mode, []).append(
                    (max(float(g.norm()) for g in grads), float(torch.stack([g.norm() for g in grads]).norm()))
                )

    for module in (one, other):
        train(module, data(), tmp_path, callbacks=[Norms()], epochs=1)
    assert all(largest <= 0.01 * 1.001 < total for largest, total in norms["tensor"])
    assert all(total <= 0.01 * 1.001 for _, total in norms["global"])


def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path):
    straight, stopped = make(drop_path=0.1), make(drop_path=0.1)
    train(straight, data(), tmp_path, epochs=4)
    path = tmp_path / "half.ckpt"

    class StopHalfway(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    train(stopped, data(), tmp_path, epochs=4, callbacks=[StopHalfway()])
    assert stopped.global_step == 6
    torch.load(path, weights_only=True)  # plain data
    resumed = make(seed=9, drop_path=0.1)
    train(resumed, data(), tmp_path, epochs=4, ckpt_path=path)
    close(resumed, straight, atol=0, rtol=0)
    assert float(resumed.center.norm()) > 0


def test_checkpoint_rebuilds_the_module(tmp_path):
    module = make()
    trainer = train(module, data(), tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = DINO.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.method == module.method and again.views_config == module.views_config
    close(again, module, atol=0, rtol=0)


def test_logged_values(tmp_path):
    trainer = train(make(), data(), tmp_path, epochs=1)
    logged = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert {
        "loss",
        "lr",
        "weight_decay",
        "teacher_entropy",
        "kl",
        "center_norm",
        "prototypes_used",
        "feature_std",
    } <= logged.keys()
    assert logged["kl"] == pytest.approx(logged["loss"] - logged["teacher_entropy"], abs=1e-5) and logged["kl"] >= 0
    assert 0 < logged["prototypes_used"] <= 1 and 0 <= logged["teacher_entropy"] <= math.log(32) + 1e-5


def test_bf16_trains_close_to_fp32(tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        trainer = train(make(optim={"lr": 1e-3}), data(), tmp_path, epochs=1, precision=precision)
        losses[precision] = float(trainer.callback_metrics["train/loss"])
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.03)
    assert losses["bf16-mixed"] != losses["32-true"]


def test_the_loss_stays_fp32_under_autocast():
    student, teacher = torch.randn(5, 4, 32), torch.randn(2, 4, 32).softmax(-1)
    expected = dino_loss(student, teacher, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dino_loss(student, teacher, 0.1)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_nan_stops_with_a_plain_sentence(tmp_path, monkeypatch):
    module = make()
    with torch.no_grad():
        module.student.head.mlp[0].weight.fill_(float("nan"))
        module.teacher.head.mlp[0].weight.copy_(module.student.head.mlp[0].weight)
    monkeypatch.setattr("vit_suite.methods.distillation.assert_twins", lambda *_: None)  # NaN is not equal to itself
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        train(module, data(), tmp_path)


def test_monitor_speaks_once_in_plain_words():
    monitor = CollapseMonitor(65536, patience=3)
    uniform = math.log(65536)
    said = [monitor.update(uniform, uniform, 300) for _ in range(6)]
    assert [sentence is not None for sentence in said] == [False, False, True, False, False, False]
    assert "ln K = 11.0904" in said[2]
    said = [monitor.update(0.5, 0.01, 1) for _ in range(6)]
    assert sum(sentence is not None for sentence in said) == 1 and "one prototype" in next(filter(None, said))


def test_monitor_keeps_quiet_while_learning():
    monitor = CollapseMonitor(1024, patience=3)
    assert not any(monitor.update(math.log(1024) - 0.02 * step, 5.0, 200) for step in range(100))
    # a loss at ln K with a sharp teacher is the start of learning, not a uniform output
    assert not any(monitor.update(math.log(1024), 4.0, 200) for _ in range(100))
    # nor is a teacher that is sure of each image, as long as it is not sure of the same for all
    assert not any(monitor.update(0.5, 0.01, 200) for _ in range(100))


@pytest.mark.parametrize(
    ("views", "words"),
    [
        (ViewsConfig(global_size=18, local_size=8), "views.global_size 18x18 is not divisible by the patch size 4"),
        (ViewsConfig(global_size=16, local_size=2), "views.local_size 2x2 is smaller than a patch of 4 pixels"),
        (ViewsConfig(global_size=16, local_size=10), "views.local_size 10x10 is not divisible by the patch size 4"),
    ],
)
def test_crops_that_do_not_fit_the_patch(views, words):
    with pytest.raises(UserError, match=words):
        make(views=views)
