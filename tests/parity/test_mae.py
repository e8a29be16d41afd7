"""Masked autoencoders against MAE's and CrossMAE's MaskedAutoencoderViT: masks, tokens, predictions, losses, every
gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_suite.config import BackboneConfig
from vit_suite.losses.reconstruction import masked_mse, patch_statistics, patchify, unpatchify
from vit_suite.models.backbone import Backbone
from vit_suite.models.masked import CrossDecoder, Decoder, SelfDecoder, encode_visible
from vit_suite.models.positions import sincos_positions
from vit_suite.views.masks import random_patches

from .golden import largest_error, load_golden, record, with_prefix

OUTPUT, LOSS, GRADIENT = 1e-5, 2e-6, 5e-6
RENAMED = {
    "mae": {
        "decoder_embed.": "embed.",
        "mask_token": "mask_token",
        "decoder_blocks.": "blocks.",
        "decoder_norm.": "norm.",
        "decoder_pred.": "predict.",
    },
    "crossmae": {
        "mask_token": "mask_token",
        "dec_norms.": "norms.",
        "wfm.linear.": "mix.",
        "decoder_blocks.": "blocks.",
        "decoder_norm.": "norm.",
        "decoder_pred.": "predict.",
    },
}


def decoder_name(fixture: str, official: str) -> str | None:
    """Our name of a decoder's parameter; None for the encoder's."""
    for theirs, ours in RENAMED[fixture].items():
        if official.startswith(theirs):
            return official.replace(theirs, ours, 1).replace("cross_attn.", "attn.")
    return None


def build(fixture: str, hyper: dict, state: dict[str, torch.Tensor]) -> tuple[Backbone, Decoder]:
    """Encoder and decoder with the fixture's weights."""
    backbone = Backbone(
        BackboneConfig(
            patch_size=hyper["patch"],
            dim=hyper["dim"],
            depth=hyper["depth"],
            heads=hyper["heads"],
            mlp_ratio=hyper["mlp_ratio"],
            positions="sincos_2d",
            image_size=[hyper["img"], hyper["img"]],
            drop_path=0.0,
        )
    )
    kind = SelfDecoder if fixture == "mae" else CrossDecoder
    decoder = kind(backbone, hyper["decoder_dim"], hyper["decoder_depth"], hyper["decoder_heads"], hyper["mlp_ratio"])
    position = state.pop("decoder_pos_embed")
    # CrossMAE's code makes its wavelengths in float32, MAE's in float64 as ours.
    tolerance = 2e-7 if fixture == "mae" else 1e-6
    record(fixture, "decoder positions", largest_error(decoder.positions, position[:, 1:]), tolerance)
    record(fixture, "encoder positions", largest_error(backbone.vit.pos_embed, state["pos_embed"]), tolerance)
    decoder.positions.copy_(position[:, 1:])
    theirs = {name: decoder_name(fixture, name) for name in state}
    decoder.load_state_dict(
        {ours: state[name].reshape(decoder.state_dict()[ours].shape) for name, ours in theirs.items() if ours}
    )
    encoder = {name: state[name] for name, ours in theirs.items() if not ours}
    missing = backbone.vit.load_state_dict(encoder, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"norm.weight", "norm.bias"}  # CrossMAE's encoder has no final norm
    return backbone, decoder


def parameters(fixture: str, backbone: Backbone, decoder: Decoder) -> dict[str, nn.Parameter]:
    """By the official names."""
    _, tensors = load_golden(fixture)
    names = list(with_prefix(tensors, "grad_normpix."))
    ours, theirs = dict(decoder.named_parameters()), dict(backbone.vit.named_parameters())
    return {name: ours[key] if (key := decoder_name(fixture, name)) else theirs[name] for name in names}


@pytest.mark.parametrize("fixture", RENAMED)
def test_masked_autoencoder(fixture):
    hyper, tensors = load_golden(fixture)
    backbone, decoder = build(fixture, hyper, with_prefix(tensors, "state."))
    split = random_patches(tensors["noise"], hyper["mask_ratio"], hyper.get("kept_mask_ratio"))
    record(fixture, "mask", largest_error(split.predicted.float(), tensors["mask"]), 0)
    record(fixture, "order", largest_error(split.order, tensors["ids_restore"]), 0)
    levels = encode_visible(backbone, tensors["x"], split.visible)
    if fixture == "mae":
        record(fixture, "visible patches", largest_error(split.visible, tensors["ids_keep"]), 0)
        tokens = backbone.vit.norm(levels[-1])
        record(fixture, "latent", largest_error(tokens, tensors["latent"]), OUTPUT)
        output = decoder(tokens, split)
    else:
        for index, level in enumerate(levels):
            record(fixture, "features of each level", largest_error(level, tensors[f"feat{index}"]), OUTPUT)
        mixed = decoder.mixtures(levels).movedim(0, -1)
        record(fixture, "mixtures", largest_error(mixed, tensors["weighted_feats"]), OUTPUT)
        output = decoder(levels, split)
    record(fixture, "prediction", largest_error(output, tensors["pred"]), OUTPUT)
    patches = patchify(tensors["x"], hyper["patch"])
    grid = backbone.native_grid
    assert torch.equal(unpatchify(patches, hyper["patch"], grid), tensors["x"])
    if "patchify" in tensors:
        record(fixture, "patchify", largest_error(patches, tensors["patchify"]), 0)
    mean, std = patch_statistics(patches)
    named = parameters(fixture, backbone, decoder)
    for kind, target in (("normpix", (patches - mean) / std), ("rawpix", patches)):
        loss = masked_mse(output, target, split.asked)
        record(fixture, f"loss, {kind}", largest_error(loss, tensors[f"loss_{kind}"]), LOSS)
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for name, gradient in zip(named, gradients, strict=True):
            golden = tensors[f"grad_{kind}.{name}"]
            record(fixture, f"gradients, {kind}", largest_error(gradient.reshape(golden.shape), golden), GRADIENT)


def test_sine_positions():
    hyper, tensors = load_golden("mae")
    for name in ("pos_embed", "decoder_pos_embed"):
        golden = tensors[f"sincos_{name}"]
        side = round((golden.shape[1] - 1) ** 0.5)
        ours = sincos_positions("sincos_2d", (side, side), golden.shape[2], 1)
        record("mae", "sine positions", largest_error(ours, golden), 2e-7)
    for dim, side in hyper["sincos_extra"]:
        ours = sincos_positions("sincos_2d", (side, side), dim, 1)[0]
        record("mae", "sine positions in float64", largest_error(ours, tensors[f"sincos_{dim}_{side}"]), 1e-6)
