"""Which heads a linear evaluation trains and how: a sweep of our own, DINO's protocol, or that of SiT's first version.

dino (facebookresearch/dino eval_linear.py): SGD with momentum 0.9, lr 1e-3 for 256 images, 100 epochs, random resized
crop and flip. Heads see CLS of the last 4 blocks (ViT-S), or CLS and the mean patch of the last block (ViT-B).
Deviations: the last epoch is scored, not the best one on the test split; the cosine moves every step, not every epoch;
crops are resized bicubically.

sit (Sara-Ahmed/SiT of April 2021, main.py --SiT_LinearEvaluation 1): AdamW, lr 1e-3 for 512 images, weight decay 5e-4,
501 epochs, 5 of them warm-up, down to 5e-6. Each token has a head; losses are added, logits averaged. The two-layer
head has 1,024 tanh units for each token. Deviations: the last epoch is scored, not the best one on the test split; the
backbone is in eval mode (theirs keeps drop path on); crop and flip only (theirs inherits RandAugment, mixup, cutmix,
erasing and label smoothing from DeiT's defaults); the weights of the heads are not averaged over steps.

sweep: the paper's learning rate suits only the paper's widths. On CIFAR-10 with a width of 128 (50,000 images, 42
heads), the best held-out rates were 0.1 to 0.3, and 1e-3 lost 3 to 8 points. 30 epochs of the sweep scored 58.1 in 48 s
on one core, 100 epochs 58.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vit_suite.config import LinearConfig
from vit_suite.errors import UserError
from vit_suite.evaluation.linear_heads import Recipe
from vit_suite.evaluation.linear_inputs import Feature, features_of, pools_of, registers
from vit_suite.models.backbone import Backbone

WIDE = 768
"""Width of ViT-B, from which on DINO probes one block with the mean of the patches."""


@dataclass(frozen=True)
class Protocol:
    """How heads train, on what, and whether images are augmented."""

    recipe: Recipe
    blocks: Sequence[int]
    pools: Sequence[str]
    augment: bool
    says: str
    """For results.json."""


def _published(name: str, backbone: Backbone) -> Protocol:
    if name == "dino":
        wide = backbone.dim >= WIDE and backbone.has_cls
        pool = "cls_mean" if wide else "cls" if backbone.has_cls else "mean"
        recipe = Recipe(lr=(1e-3,), epochs=100)
        return Protocol(recipe, [1 if wide else 4], [pool], True, "DINO's; last epoch instead of the best on test")
    if name == "sit":
        recipe = Recipe(lr=(5e-4,), epochs=501, optimizer="adamw", weight_decay=5e-4, warmup_epochs=5, min_lr=5e-6)
        return Protocol(
            recipe,
            [1],
            ["tokens"],
            True,
            "SiT's first version; last epoch instead of the best on test; crop and flip only",
        )
    recipe = Recipe(lr=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), epochs=30)
    return Protocol(recipe, [1, 4], pools_of(backbone), False, "sweep")


def resolve(cfg: LinearConfig, backbone: Backbone) -> tuple[Protocol, list[Feature]]:
    """The protocol that `cfg` names with what `cfg` says otherwise, and the inputs of its heads.

    A default number of blocks is reduced to what the backbone has; a number that was asked for is not.

    Raises:
        UserError: the backbone lacks what a pooling or the protocol needs, or the options do not go together.
    """
    if cfg.protocol == "sit" and not cfg.pool and not registers(backbone):
        raise UserError(
            f"protocol sit: SiT's heads sit on two tokens, and the backbone of '{cfg.checkpoint}' has"
            f" {backbone.prefix_tokens} (backbone.registers is 0); use --protocol dino or sweep."
        )
    known = _published(cfg.protocol, backbone)
    augment = known.augment if cfg.augment is None else cfg.augment
    if cfg.shots and augment:
        raise UserError("shots: few-shot heads train on features that are extracted once; add --augment false.")
    recipe = replace(
        known.recipe,
        lr=tuple(dict.fromkeys(cfg.lr or known.recipe.lr)),
        epochs=cfg.epochs or known.recipe.epochs,
        batch_size=cfg.batch_size,
        hidden_dim=cfg.hidden_dim if cfg.head == "mlp" else 0,
        steps=cfg.shot_steps if cfg.shots else None,
        seed=cfg.seed,
    )
    if len(recipe.lr) > 1 and recipe.optimizer == "adamw":
        raise UserError(
            f"lr: protocol {cfg.protocol} trains with AdamW, which takes one learning rate at a time, not"
            f" {len(recipe.lr)}."
        )
    blocks = cfg.blocks or [min(count, backbone.depth) for count in known.blocks]
    pools = cfg.pool or known.pools
    return replace(known, recipe=recipe, blocks=blocks, pools=pools, augment=augment), features_of(
        backbone, pools, blocks, cfg.checkpoint
    )
