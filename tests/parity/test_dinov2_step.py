"""A whole training step of DINOv2: student, teacher, masks, targets, losses and every gradient against the official
`forward_backward`, with both ways of centering, and a shared and a separate head."""

from __future__ import annotations

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.config.dinov2 import DINOv2Config, DINOv2ViewsConfig
from vit_suite.methods.dinov2 import DINOv2, Network
from vit_suite.views.masks import Masks

from .golden import largest_error, load_golden, record, with_prefix

FIXTURE = "dinov2_step"
LOSS, GRADIENT, CENTER = 1e-5, 5e-5, 1e-6
CENTERING = {"centering": "ema", "sinkhorn_knopp": "sinkhorn_knopp"}


def network_state(golden: dict[str, torch.Tensor], separate: bool) -> dict[str, torch.Tensor]:
    """Official names and shapes -> ours. timm keeps the CLS token's position within the token."""
    found = {}
    for name, tensor in golden.items():
        if name.startswith("ibot_head.") and not separate:
            continue
        name = name.replace("dino_head.", "head.")
        found[our_name(name)] = tensor
    position = found["backbone.vit.pos_embed"]
    found["backbone.vit.cls_token"] = found["backbone.vit.cls_token"] + position[:, :1]
    found["backbone.vit.pos_embed"] = position[:, 1:]
    return found


def our_name(official: str) -> str:
    """Our name of an official parameter."""
    name = official.replace("dino_head.", "head.")
    if name == "backbone.mask_token":
        return "mask_token"
    return name.replace("backbone.", "backbone.vit.").replace("register_tokens", "reg_token")


def build(hyper: dict, variant: dict, tensors: dict[str, torch.Tensor]) -> DINOv2:
    """The method with the fixture's weights, its masks, and the teacher temperature of the fixture."""
    method = DINOv2Config(
        out_dim=hyper["out_dim"],
        hidden_dim=hyper["hidden"],
        bottleneck_dim=hyper["bottleneck"],
        separate_head=variant["separate_head"],
        centering=CENTERING[variant["centering"]],
        warmup_teacher_temperature_epochs=0,
        teacher_temperature=hyper["teacher_temp"],
        dino_weight=hyper["dino_loss_weight"],
        ibot_weight=hyper["ibot_loss_weight"],
        koleo_weight=hyper["koleo_loss_weight"],
    )
    backbone = BackboneConfig(
        name="vit_small_patch14_reg4_dinov2",
        patch_size=hyper["patch"],
        dim=hyper["dim"],
        depth=hyper["depth"],
        heads=hyper["heads"],
        mlp_ratio=hyper["mlp_ratio"],
        registers=hyper["num_register_tokens"],
        resize="offset",
        drop_path=0.0,
    )
    views = DINOv2ViewsConfig(global_size=hyper["img"], local_size=hyper["local"], local_crops=hyper["local_crops"])
    module = DINOv2(method, backbone, views)
    for name in ("student", "teacher"):
        state = network_state(with_prefix(tensors, f"state.{name}."), variant["separate_head"])
        getattr(module, name).load_state_dict(state)
    masks = tensors["masks"].unflatten(0, (2, hyper["batch"]))
    module.masks = lambda images, draw: Masks(masks, hyper["upperbound"])
    return module


def gradients(student: Network, names: list[str]) -> dict[str, torch.Tensor]:
    """Of each official parameter; zeros where it has none."""
    ours = dict(student.named_parameters())
    found = {}
    for name in names:
        parameter = ours.get(our_name(name))
        gradient = None if parameter is None else parameter.grad
        if name == "backbone.pos_embed":  # the CLS token's position moves as the CLS token does
            gradient = torch.cat([ours["backbone.vit.cls_token"].grad, gradient], dim=1)
        found[name] = gradient
    return found


@pytest.mark.parametrize("kind", ["sk", "ce"])
def test_step(kind):
    hyper, tensors = load_golden(FIXTURE)
    variant = hyper["variants"][kind]
    module = build(hyper, variant, tensors)
    batch = hyper["batch"]
    crops = [*tensors["global_crops"].split(batch), *tensors["local_crops"].split(batch)]
    for call in range(hyper["iters"]):
        module.zero_grad()
        golden = {
            name.removesuffix(f"_{call}"): value
            for name, value in with_prefix(tensors, f"{kind}.").items()
            if name.endswith(f"_{call}")
        }
        values = module.losses(crops)
        values["loss"].backward()
        record(FIXTURE, "total", largest_error(values["loss"], golden["total"]), LOSS)
        # What the official code logs of these two is half of what it adds up.
        record(FIXTURE, "iBOT", largest_error(values["ibot"] / 2, golden["ibot_loss"]), LOSS)
        koleo = hyper["koleo_loss_weight"] * values["koleo"] / 2
        record(FIXTURE, "KoLeo", largest_error(koleo, golden["koleo_loss"]), LOSS)
        of_dino = golden["dino_local_crops_loss"] + golden["dino_global_crops_loss"]
        record(FIXTURE, "DINO", largest_error(values["dino"], of_dino), LOSS)
        if values.sums:
            module.use_sums(values.sums)
    names = hyper["param_names"]
    found = gradients(module.student, names)
    norms = tensors[f"{kind}.grad_norm"]
    for name, norm in zip(names, norms.tolist(), strict=True):
        gradient = found[name]
        if gradient is None:  # the unused head of the shared variant
            assert norm == 0, name
            continue
        error = abs(float(gradient.double().norm()) - norm)
        record(FIXTURE, "norm of each gradient", error, 1e-4 + 2e-6 * norm)
        if variant["grads"] == "all":
            golden = tensors[f"{kind}.grad.{name}"]
            record(FIXTURE, "gradients", largest_error(gradient.reshape(golden.shape), golden), GRADIENT)
    if variant["centering"] == "centering":
        # The official centers lag one update behind: they have seen all calls but the last.
        momentum = module.method.center_momentum
        for name, what in (("center", "dino_center"), ("patch_center", "ibot_center")):
            sums = values.sums
            prefix = "patch_" if name == "patch_center" else ""
            mean = sums[f"{prefix}logits"] / sums[f"{prefix}count"]
            before = (getattr(module, name) - (1 - momentum) * mean) / momentum
            record(FIXTURE, "centers", largest_error(before, tensors[f"{kind}.{what}"].flatten()), CENTER)
