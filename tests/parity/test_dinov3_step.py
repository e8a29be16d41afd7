"""A whole training step of DINOv3: rotary positions, Sinkhorn-Knopp, plain last layers and Gram anchoring on larger
crops, losses and every gradient against the official `forward_backward`."""

from __future__ import annotations

import torch

from vit_suite.config import BackboneConfig
from vit_suite.config.dinov2 import DINOv2Config, DINOv2ViewsConfig
from vit_suite.losses.dino import dino_loss
from vit_suite.losses.gram import gram_loss
from vit_suite.methods.dinov2 import DINOv2, masked_patches
from vit_suite.views.masks import Masks
from vit_suite.weights.families import by_name

from .golden import largest_error, load_golden, record, with_prefix

FIXTURE = "dinov3_step"
LOSS, GRADIENT = 1e-5, 8e-5
HEADS = {"dino_head.": "head.", "ibot_head.": "ibot_head."}


def renamed(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official names -> ours, of weights or of their gradients; what is no parameter of ours is left out."""
    backbone = with_prefix(golden, "backbone.")
    token = backbone.pop("mask_token")
    ours = by_name("dinov3").rename({name: tensor for name, tensor in backbone.items()})
    found = {
        f"backbone.vit.{name}": tensor
        for name, tensor in ours.items()
        if not name.endswith(("periods", "bias_mask", "mask_token"))
    }
    for theirs, mine in HEADS.items():
        found |= {mine + name: tensor for name, tensor in with_prefix(golden, theirs).items()}
    return found | {"mask_token": token.reshape(1, -1)}


def build() -> tuple[dict, dict[str, torch.Tensor], DINOv2]:
    """Hyperparameters, tensors, and the method with the fixture's weights and masks."""
    hyper, tensors = load_golden(FIXTURE)
    method = DINOv2Config(
        out_dim=hyper["out_dim"],
        hidden_dim=hyper["hidden"],
        bottleneck_dim=hyper["bottleneck"],
        last_layer="linear",
        separate_head=True,
        centering="sinkhorn_knopp",
        warmup_teacher_temperature_epochs=0,
        teacher_temperature=hyper["teacher_temp"],
        dino_weight=hyper["dino_loss_weight"],
        ibot_weight=hyper["ibot_loss_weight"],
        koleo_weight=hyper["koleo_loss_weight"],
        gram_weight=hyper["gram_loss_weight"],
    )
    backbone = BackboneConfig(
        patch_size=hyper["patch"],
        dim=hyper["dim"],
        depth=hyper["depth"],
        heads=hyper["heads"],
        mlp_ratio=hyper["mlp_ratio"],
        registers=hyper["n_storage_tokens"],
        positions="rope",
        layer_scale=1e-5,
        drop_path=0.0,
    )
    views = DINOv2ViewsConfig(
        global_size=hyper["img"],
        local_size=hyper["local"],
        local_crops=hyper["local_crops"],
        gram_size=tensors["gram_crops"].shape[-1],
    )
    module = DINOv2(method, backbone, views)
    for name in ("student", "teacher"):
        getattr(module, name).load_state_dict(renamed(with_prefix(tensors, f"state.{name}.")))
    gram = renamed(with_prefix(tensors, "state.gram_teacher."))
    gram.pop("mask_token")
    module.gram_teacher.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in gram.items()})
    masks = Masks(tensors["masks"].unflatten(0, (2, hyper["batch"])), hyper["upperbound"])
    module.masks = lambda images, draw: masks
    return hyper, tensors, module


def test_step_with_anchor():
    hyper, tensors, module = build()
    batch = hyper["batch"]
    golden = with_prefix(tensors, "anchor.")
    crops = [
        *tensors["global_crops"].split(batch),
        *tensors["local_crops"].split(batch),
        *tensors["gram_crops"].split(batch),
    ]
    values = module.losses(crops)
    values["loss"].backward()
    record(FIXTURE, "total", largest_error(values["loss"], golden["total_0"]), LOSS)
    record(FIXTURE, "Gram", largest_error(values["gram"], golden["gram_loss_0"]), LOSS)
    record(FIXTURE, "iBOT", largest_error(values["ibot"], golden["ibot_loss_0"]), LOSS)
    record(FIXTURE, "KoLeo", largest_error(values["koleo"] / 2, golden["koleo_loss_0"]), LOSS)  # logged as a mean
    expected = renamed(with_prefix(golden, "grad."))
    mine = {name: parameter.grad for name, parameter in module.student.named_parameters()}
    assert set(mine) == set(expected)
    for name, gradient in mine.items():
        record(FIXTURE, "gradients", largest_error(gradient, expected[name].reshape(gradient.shape)), GRADIENT)


def test_step_against_the_teacher_itself():
    """The other variant: Gram over the masked patches of the whole batch against the EMA teacher, and CLS pairs of the
    same crop count. The method has no options for these, its parts do."""
    hyper, tensors, module = build()
    batch, views = hyper["batch"], 2 + hyper["local_crops"]
    golden = with_prefix(tensors, "ema.")
    crops = [*tensors["global_crops"].split(batch), *tensors["local_crops"].split(batch)]
    masks = module.masks(crops[0], None)
    masked, hidden = masked_patches(masks), masks.hidden.flatten(0, 1)
    with torch.no_grad():
        teacher = module.teacher.features(crops[:2])
        target, patch_target, _ = module.targets(teacher, masked)
    student = module.student.features(crops, masks.hidden)
    values = module.parts(student, target, patch_target, masked)
    # As views of which none is the teacher's, all pairs count.
    logits = module.student.logits(student.cls)
    pairs, counted = 2 * views, 2 * (views + 2) - 2
    dino = dino_loss(logits, target, 0.1, first=2, views=views + 2) * counted / pairs
    gram = gram_loss(student.patches[hidden], teacher.patches[hidden], within_image=False)
    method = module.method
    total = method.dino_weight * dino + method.koleo_weight * values["koleo"]
    total = total + method.ibot_weight * values["ibot"] + method.gram_weight * gram
    total.backward()
    record(FIXTURE, "Gram, masked patches of the batch", largest_error(gram, golden["gram_loss_0"]), LOSS)
    record(FIXTURE, "total, all pairs of crops", largest_error(total, golden["total_0"]), LOSS)
    ours = torch.tensor([float(p.grad.double().norm()) for p in module.student.parameters()]).norm()
    record(FIXTURE, "norm of all gradients", largest_error(ours, golden["grad_norm"].norm()), 1e-4)
