"""Training steps of lightly (pip install 'vit-suite[bench]') for the benches: its heads, losses and masking on a timm
ViT, in the order of calls of its examples. DINO, DINOv2 (one shared head, the default there) and MAE; it has no
CrossMAE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models import utils
from lightly.models.modules import DINOProjectionHead, DINOv2ProjectionHead, MAEDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit_suite.hardware import autocast

Step = Callable[[], Tensor]
GLOBALS = 2


def network(case: dict, **options) -> VisionTransformer:
    """A timm ViT of the size of a case of scripts/bench_step.py."""
    shape = {"patch_size": case["patch"], "embed_dim": case["dim"], "depth": case["depth"], "num_heads": case["heads"]}
    return VisionTransformer(img_size=case["sizes"][0], num_classes=0, **shape, **options)


def stepper(student: nn.Module, loss_of: Callable[[], Tensor], precision: str, device: torch.device) -> Step:
    """One call is loss, backward, clipping and AdamW; the loss."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)

    def step() -> Tensor:
        with autocast(precision, device):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        return loss.detach()

    return step


def dino(case: dict, crops: list[Tensor], precision: str, device: torch.device) -> Step:
    """Its DINO: one crop after the other through both networks."""

    def both() -> nn.Sequential:
        head = DINOProjectionHead(case["dim"], 2048, 256, case["prototypes"])
        return nn.Sequential(network(case, dynamic_img_size=True), head).to(device)

    student, teacher, criterion = both(), both().requires_grad_(False), DINOLoss(case["prototypes"]).to(device)
    teacher.load_state_dict(student.state_dict())

    def loss() -> Tensor:
        utils.update_momentum(student, teacher, m=0.996)
        return criterion([teacher(crop) for crop in crops[:GLOBALS]], [student(crop) for crop in crops], epoch=0)

    return stepper(student, loss, precision, device)


def dinov2(case: dict, crops: list[Tensor], precision: str, device: torch.device) -> Step:
    """Its DINOv2: DINO, iBOT on masked patches and KoLeo; all crops of a size at once; masks drawn on the CPU."""

    def both() -> nn.ModuleDict:
        vit = network(case, dynamic_img_size=True, init_values=1e-5)
        backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
        head = DINOv2ProjectionHead(case["dim"], output_dim=case["prototypes"])
        return nn.ModuleDict({"backbone": backbone, "head": head}).to(device)

    student, teacher = both(), both().requires_grad_(False).eval()
    teacher.load_state_dict(student.state_dict())
    of_cls, of_patches = DINOLoss(case["prototypes"]).to(device), IBOTPatchLoss(case["prototypes"]).to(device)
    koleo = KoLeoLoss()
    large, small = torch.cat(crops[:GLOBALS]), torch.cat(crops[GLOBALS:])
    grid = teacher["backbone"].vit.patch_embed.grid_size

    def loss() -> Tensor:
        utils.update_momentum(student, teacher, m=0.992)
        blocks = utils.random_block_mask(size=(len(large), *grid), device=device)
        hidden = torch.cat([blocks.new_zeros(len(large), 1), blocks.flatten(1)], 1)  # the CLS token is never masked
        with torch.no_grad():
            wanted = teacher["backbone"].encode(large)
            wanted_cls, wanted_patches = teacher["head"](wanted[:, 0]), teacher["head"](wanted[hidden])
        found = student["backbone"].encode(large, mask=hidden)
        cls = torch.cat([student["head"](found[:, 0]), student["head"](student["backbone"].encode(small)[:, 0])])
        total = of_cls(wanted_cls.chunk(GLOBALS), cls.chunk(len(crops)), teacher_temp=0.04)
        total = total + of_patches(wanted_patches, student["head"](found[hidden]), mask=blocks, teacher_temp=0.04)
        return total + 0.1 * sum(koleo(tokens) for tokens in found[:, 0].chunk(GLOBALS))

    return stepper(student, loss, precision, device)


def mae(case: dict, crops: list[Tensor], precision: str, device: torch.device) -> Step:
    """Its MAE with the decoder of `method_of` in scripts/bench_step.py; pixels as they are, which costs less than
    normalized ones."""
    encoder = MaskedVisionTransformerTIMM(vit=network(case))
    decoder = MAEDecoderTIMM(
        num_patches=encoder.vit.patch_embed.num_patches,
        patch_size=case["patch"],
        embed_dim=case["dim"],
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=4,
    )
    both, images = nn.ModuleList([encoder, decoder]).to(device), crops[0]
    size = (len(images), encoder.sequence_length)

    def loss() -> Tensor:
        kept, hidden = utils.random_token_mask(size=size, mask_ratio=0.75, device=device)
        seen = decoder.embed(encoder.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, kept, seen.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        return nn.functional.mse_loss(
            predicted, utils.get_at_index(utils.patchify(images, case["patch"]), hidden - 1)
        )  # place 0 is the CLS token

    return stepper(both, loss, precision, device)


STEPS = {"dino": dino, "dinov2": dinov2, "mae": mae}
