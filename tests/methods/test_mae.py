"""Masked autoencoders as modules under a Trainer: what the encoder sees and costs, pictures, attention, resume. Numbers
are in tests/parity."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_suite.config import BackboneConfig
from vit_suite.config.mae import MAEConfig, MAEOptimConfig, MAEViewsConfig
from vit_suite.errors import UserError
from vit_suite.losses.reconstruction import patchify, unpatchify
from vit_suite.methods.mae import MAE
from vit_suite.models.masked import encode_visible
from vit_suite.views.draw import alone

from .test_dino import close, data, train

CROSS = {"decoder": "cross", "predict_ratio": 0.5}


def make(seed: int = 0, method: dict | None = None, backbone: dict | None = None, optim: dict | None = None) -> MAE:
    torch.manual_seed(seed)
    small = {"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "positions": "sincos_2d", "drop_path": 0.0}
    return MAE(
        MAEConfig(**{"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2} | (method or {})),
        BackboneConfig(**small | (backbone or {})),
        MAEViewsConfig(global_size=16),
        MAEOptimConfig(**{"lr": 1e-2, "warmup_epochs": 0.5} | (optim or {})),
        batch_size=16,
    )


def images(batch: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_the_encoder_sees_visible_patches_alone(method):
    module, clean = make(method=method), images()
    draw = alone(4, 1)
    split = module.split_patches(clean.device, draw, module.method.predict_ratio)
    assert split.visible.shape == (4, 4) and split.asked.shape == (4, 8 if method else 12)
    tokens = encode_visible(module.student.backbone, clean, split.visible)[-1]
    assert tokens.shape == (4, 1 + 4, 24)
    hidden = torch.ones(4, 16, dtype=torch.bool).scatter(1, split.visible, False)
    changed = patchify(clean, 4)
    changed[hidden] = changed[hidden].flip(-1)  # not by a constant, which norm_pix_loss takes away
    again = encode_visible(module.student.backbone, restored(changed), split.visible)[-1]
    assert torch.equal(tokens, again)
    assert module.losses([restored(changed)], draw=draw)["loss"] != module.losses([clean], draw=draw)["loss"]


def restored(patches: torch.Tensor) -> torch.Tensor:
    return unpatchify(patches, 4, (4, 4))


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_the_loss_is_of_the_predicted_patches(method):
    """Without norm_pix_loss a visible patch changes the loss through the encoder alone: with a decoder that answers 0,
    not at all."""
    module = make(method=method | {"norm_pix_loss": False})
    with torch.no_grad():
        module.student.decoder.predict.weight.zero_()
    draw, clean = alone(4, 1), images()
    split = module.split_patches(clean.device, draw, module.method.predict_ratio)
    patches = patchify(clean, 4)
    expected = patches[split.predicted].square().mean()
    torch.testing.assert_close(module.losses([clean], draw=draw)["loss"], expected)


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_every_parameter_has_a_gradient(method):
    """DDP would wait for one without."""
    module = make(method=method)
    module.losses([images()])["loss"].backward()
    assert [name for name, p in module.student.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [name for name, p in module.student.named_parameters() if not p.requires_grad]
    assert frozen == (["backbone.vit.norm.weight", "backbone.vit.norm.bias"] if method else [])


def encoder_flops(mask_ratio: float) -> int:
    """Of the blocks of ViT-S/16's shape at 224 pixels, on 1 image."""
    with torch.device("meta"):
        module = MAE(
            MAEConfig(mask_ratio=mask_ratio),
            BackboneConfig(patch_size=16, dim=384, depth=12, heads=6, positions="sincos_2d", drop_path=0.0),
            MAEViewsConfig(global_size=224),
        )
        visible = torch.zeros(1, int(196 * (1 - mask_ratio)) or 1, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            encode_visible(module.student.backbone, torch.zeros(1, 3, 224, 224), visible)
    return counter.get_total_flops()


def test_the_encoder_costs_what_it_sees():
    """49 of 196 patches: a quarter of the linear layers, a sixteenth of the products of attention; CLS and the patch
    embedding stay."""
    whole, masked = encoder_flops(0.001), encoder_flops(0.75)
    assert 0.22 < masked / whole < 0.29, masked / whole


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_the_sheet_keeps_visible_patches_and_fills_the_hidden(method):
    module, clean = make(method=method), images()
    same, shown, filled = module.sheet(clean)[:3]
    assert same is clean and shown.shape == filled.shape == clean.shape and module.student.training
    split = module.split_patches(clean.device, alone(4, module.seed), None)
    hidden = split.predicted.unsqueeze(-1)
    pixels, seen, made = (patchify(picture, 4) for picture in (clean, shown, filled))
    assert torch.equal(torch.where(hidden, 0, pixels), seen)
    assert torch.equal(torch.where(hidden, 0, pixels), torch.where(hidden, 0, made))
    assert float((made - pixels)[hidden.expand_as(made)].abs().min()) > 0
    # norm_pix_loss: the patch's own mean and contrast are given back.
    torch.testing.assert_close(made.mean(-1)[hidden[..., 0]], pixels.mean(-1)[hidden[..., 0]], atol=2.0, rtol=0)


def test_it_learns_to_reconstruct(tmp_path):
    """Shapes on a plain ground: in 90 steps the error falls by 40% at least."""
    for method in ({}, CROSS):
        module = make(
            method=method | {"mask_ratio": 0.5, "norm_pix_loss": False}, optim={"lr": 0.1, "warmup_epochs": 2}
        )
        losses = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, *_, losses=losses):
                losses.append(float(trainer.callback_metrics["train/loss"]))

        train(module, data(), tmp_path, epochs=30, callbacks=[Watch()])
        assert len(losses) == 90 and sum(losses[-6:]) < 0.6 * sum(losses[:6]), (losses[:6], losses[-6:])


def test_cross_attention_maps():
    module, clean = make(method=CROSS), images()
    maps, split = module.decoder_attention(clean)
    assert maps.shape == (4, 2, 16, 16)
    rows = maps.sum(-1)
    predicted = split.predicted.unsqueeze(1).expand_as(rows)
    assert (rows[predicted] > 0).all() and (rows[predicted] <= 1 + 1e-5).all() and not rows[~predicted].any()
    hidden = torch.ones(4, 16, dtype=torch.bool).scatter(1, split.visible, False)
    assert not maps.transpose(-1, -2)[hidden.unsqueeze(1).expand(-1, 2, -1)].any()
    with pytest.raises(UserError, match=r"method\.decoder is self"):
        make().decoder_attention(clean)


def test_the_sheet_of_a_cross_decoder_shows_where_a_hidden_patch_looks():
    module, clean = make(method=CROSS), images()
    assert len(make().sheet(clean)) == 3
    row = module.sheet(clean)[3]
    maps, split = module.decoder_attention(clean, alone(4, module.seed))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (module.mean, module.std))
    pixels, seen = patchify(row * std + mean, 4), patchify(clean * std + mean, 4)
    for image in range(4):
        hidden = split.predicted[image].nonzero().flatten().tolist()
        asks = min(hidden, key=lambda place: (place // 4 - 1.5) ** 2 + (place % 4 - 1.5) ** 2)
        light = maps[image, :, asks].mean(0)
        expected = seen[image] * (light / light.max()).unsqueeze(-1)
        expected[asks] = 1.0
        torch.testing.assert_close(pixels[image], expected, atol=1e-5, rtol=0)


def test_cross_attention_maps_are_what_the_block_computes():
    """The weights, applied to the values, give the block's answer."""
    module, clean = make(method=CROSS), images()
    student, decoder = module.student, module.student.decoder
    split = module.split_patches(clean.device, alone(4), 0.5)
    levels = encode_visible(student.backbone, clean, split.visible)
    block, norm, tokens = decoder.blocks[0], decoder.norms[0], decoder.mixtures(levels)[0]
    queries, tokens = block.norm1(decoder.queries(split)), norm(tokens)
    weights = decoder.attention(levels, split, 0)
    values = block.attn.heads_of(queries, tokens)[2]
    expected = block.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attn(queries, tokens), expected)


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, method):
    straight, stopped = (make(method=method, backbone={"drop_path": 0.2}) for _ in range(2))
    train(straight, data(), tmp_path, epochs=4)
    path = tmp_path / "half.ckpt"

    class StopHalfway(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    train(stopped, data(), tmp_path, epochs=4, callbacks=[StopHalfway()])
    torch.load(path, weights_only=True)  # plain data
    resumed = make(seed=9, method=method, backbone={"drop_path": 0.2})
    train(resumed, data(), tmp_path, epochs=4, ckpt_path=path)
    close(resumed, straight, atol=0, rtol=0)


def test_accumulated_micro_batches_give_the_loss_of_the_whole_batch(tmp_path):
    traces = []
    for accumulate in (1, 2):
        module, losses = make(method=CROSS, backbone={"drop_path": 0.3}), []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, losses=losses):
                if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                    losses.append(float(trainer.logged_metrics["train/loss"]))

        train(module, data(accumulate), tmp_path, callbacks=[Watch()], accumulate_grad_batches=accumulate)
        traces.append(losses)
    assert len(traces[0]) == 6 and traces[1] == pytest.approx(traces[0], abs=2e-4)
    assert make().compares_images() == []


@pytest.mark.parametrize("method", [{}, CROSS], ids=["self", "cross"])
def test_bf16_trains_close_to_fp32(tmp_path, method):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        trainer = train(make(method=method, optim={"lr": 1e-3}), data(), tmp_path, epochs=1, precision=precision)
        losses[precision] = float(trainer.callback_metrics["train/loss"])
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.03)


def test_without_cls_token_and_with_registers():
    for backbone in ({"class_token": False, "pool": "mean"}, {"registers": 3}):
        for method in ({}, CROSS):
            module = make(method=method, backbone=backbone)
            module.losses([images()])["loss"].backward()
            assert [p for p in module.sheet(images()) if not torch.isfinite(p).all()] == []


@pytest.mark.parametrize(
    "method, backbone, message",
    [
        ({"predict_ratio": 0.5}, {}, "method.predict_ratio is for method.decoder cross"),
        ({}, {"stem": "conv"}, "backbone.stem conv is not for method mae: its convolutions overlap"),
        (
            {"decoder": "cross", "predict_ratio": 0.9},
            {},
            "method.predict_ratio 0.9 is more than method.mask_ratio 0.75",
        ),
        ({"mask_ratio": 0.99}, {}, "method.mask_ratio 0.99 of 16 patches leaves none visible"),
        ({"decoder_dim": 18, "decoder_heads": 2}, {}, "method.decoder_dim 18 is not divisible by 4"),
        ({"decoder_heads": 3}, {}, "method.decoder_dim 16 is not divisible by method.decoder_heads 3"),
        ({}, {"image_size": [32, 32]}, "backbone.image_size [32, 32] is not views.global_size 16"),
        ({}, {"causal": True}, "backbone.causal needs all patches in order"),
    ],
)
def test_contradictions_are_refused(method, backbone, message):
    with pytest.raises(UserError) as error:
        make(method=method, backbone=backbone)
    assert message in str(error.value)
