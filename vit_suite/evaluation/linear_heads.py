"""Classification heads on frozen features. Many train at once, in the same batches, each with its own rate and input.

DINOv2 trains all settings of a sweep side by side (arXiv 2304.07193, eval/linear.py), as separate modules. Here the
heads that share an input are one tensor, so that a step is a few matrix products, however many rates there are.

Axes: B images, P parts, D width of a part, W width of a head's input, T heads of a feature that are averaged (1, or one
for each token), L learning rates, H hidden width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite.data.order import epoch_order
from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError
from vit_suite.evaluation.linear_inputs import Feature
from vit_suite.logs import progress_bar
from vit_suite.optim.schedules import cosine

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""Epoch -> its batches: parts (B, P, D) and labels (B,)."""
CHUNK = 4096
"""Rows that are scored at a time."""


class Setting(NamedTuple):
    """What distinguishes the heads of a sweep. lr: for a batch of 256."""

    lr: float
    pool: str
    blocks: int

    @property
    def feature(self) -> Feature:
        return Feature(self.pool, self.blocks)


@dataclass(frozen=True)
class Recipe:
    """How heads train."""

    lr: tuple[float, ...]
    """Peak learning rates for a batch of 256; scaled by batch_size / 256."""
    epochs: int
    batch_size: int = 256
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    min_lr: float = 0.0
    """The rate that the cosine ends at; not scaled."""
    steps: int | None = None
    """Optimizer steps in place of `epochs`."""
    hidden_dim: int = 0
    """Width of the hidden layer; 0 for a linear head."""
    seed: int = 0
    """Seed of the first weights and of the batches."""


@dataclass(frozen=True)
class HeadScore:
    """A head's score: top-1 and top-5 in percent, cross-entropy in nats (infinite or nan when the head has
    diverged)."""

    setting: Setting
    top1: float
    top5: float
    loss: float


class Heads(nn.Module):
    """The heads of one feature, one for each learning rate. All rates start from the same weights.

    First weights have a standard deviation of 0.01 before the logits (DINO eval_linear.py), and of 1 / sqrt(W) before
    tanh, so that tanh gets inputs of order one.
    """

    def __init__(
        self, feature: Feature, columns: Sequence[Sequence[int]], dim: int, rates: int, classes: int, recipe: Recipe
    ):
        super().__init__()
        self.columns = [column for head in columns for column in head]
        self.tokens = len(columns)
        width = dim * len(columns[0])
        generator = torch.Generator().manual_seed(stable_seed("heads", recipe.seed, *feature))

        def weight(rows: int, outputs: int, std: float) -> nn.Parameter:
            first = torch.randn(self.tokens, rows, 1, outputs, generator=generator) * std
            return nn.Parameter(first.repeat(1, 1, rates, 1))  # (T, rows, L, outputs)

        def bias(outputs: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(self.tokens, rates, outputs))

        hidden = recipe.hidden_dim
        self.first = nn.ParameterList([weight(width, hidden, width**-0.5), bias(hidden)] if hidden else [])
        self.last = nn.ParameterList([weight(hidden or width, classes, 0.01), bias(classes)])

    def forward(self, parts: Tensor) -> Tensor:
        """(B, P, D) -> logits (B, T, L, K)."""
        x = parts[:, self.columns].reshape(len(parts), self.tokens, -1)  # (B, T, W)
        if not self.first:
            return torch.einsum("btw,twlk->btlk", x, self.last[0]) + self.last[1]
        hidden = torch.tanh(torch.einsum("btw,twlh->btlh", x, self.first[0]) + self.first[1])
        return torch.einsum("btlh,thlk->btlk", hidden, self.last[0]) + self.last[1]


class Sweep(nn.Module):
    """Every head of a sweep: `columns` (feature -> columns of its heads, of `dim` numbers each) x `recipe.lr`."""

    def __init__(self, columns: Mapping[Feature, Sequence[Sequence[int]]], dim: int, classes: int, recipe: Recipe):
        super().__init__()
        self.recipe, self.classes = recipe, classes
        self.settings = [Setting(lr, *feature) for feature in columns for lr in recipe.lr]
        self.heads = nn.ModuleList(
            Heads(feature, heads, dim, len(recipe.lr), classes, recipe) for feature, heads in columns.items()
        )

    def logits(self, parts: Tensor) -> Tensor:
        """(B, P, D) -> (B, settings, K), averaged over the heads of a feature (SiT)."""
        return torch.cat([heads(parts).mean(1) for heads in self.heads], dim=1)

    def losses(self, parts: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each setting (settings,): the mean over images of the sum over its T heads. SiT trains these
        one by one."""
        found = []
        for heads in self.heads:
            logits = heads(parts)
            each = labels.view(-1, 1, 1).expand(logits.shape[:-1])
            found.append(
                functional.cross_entropy(logits.flatten(0, 2), each.flatten(), reduction="none")
                .view(each.shape)
                .sum(1)
                .mean(0)
            )
        return torch.cat(found)

    def optimizer(self) -> tuple[torch.optim.Optimizer, Tensor, float]:
        """(the optimizer, the factor on each setting's loss (settings,), the peak learning rate).

        Heads of several rates share a tensor. Without weight decay, SGD's step is linear in the gradient, with momentum
        too, so a factor on the loss acts as a factor on the rate. AdamW does not have this property and takes one rate.
        """
        recipe = self.recipe
        rates = torch.tensor([setting.lr for setting in self.settings]) * recipe.batch_size / 256
        if recipe.optimizer == "sgd":
            if recipe.weight_decay:
                raise ValueError("weight decay would depend on the factor that stands for the learning rate")
            return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9), rates, 1.0
        if len(recipe.lr) > 1:
            raise UserError(
                f"lr: {len(recipe.lr)} learning rates, but this protocol trains with AdamW, which takes one at a time."
            )
        weights = [parameter for parameter in self.parameters() if parameter.ndim == 4]
        biases = [parameter for parameter in self.parameters() if parameter.ndim == 3]
        groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups), torch.ones_like(rates), float(rates[0])


def fit(sweep: Sweep, batches: Batches, per_epoch: int, desc: str | None = None) -> Sweep:
    """Train every head of `sweep` in the same batches, `per_epoch` of them in an epoch.

    desc: title of a progress bar; none is shown when None.
    """
    recipe, device = sweep.recipe, next(sweep.parameters()).device
    total = recipe.steps or recipe.epochs * per_epoch
    optimizer, factors, peak = sweep.optimizer()
    factors = factors.to(device)
    sweep.train()
    with progress_bar(total, desc, "step", shown=desc is not None) as bar:
        for step, (parts, labels) in enumerate(_endless(batches, total)):
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, total, peak, recipe.min_lr, recipe.warmup_epochs * per_epoch)
            losses = sweep.losses(parts.to(device).float(), labels.to(device))
            optimizer.zero_grad()
            (losses * factors).sum().backward()  # heads share no weights: each gets the gradient of its own loss
            optimizer.step()
            bar.update()
    return sweep.eval()


def _endless(batches: Batches, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while steps > 0:
        for batch in batches(epoch):
            if steps == 0:
                return
            yield batch
            steps -= 1
        epoch += 1


def stored(parts: Tensor, labels: Tensor, rows: Tensor, batch_size: int, seed: int) -> tuple[Batches, int]:
    """(batches, batches in an epoch) of these `rows` (N,) of features in memory, on the device where they are.

    Each epoch has its own permutation. A smaller last batch is dropped, so that no step depends on a few images.
    """
    size = min(batch_size, len(rows))
    rows, labels = rows.to(parts.device), labels.to(parts.device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = rows[epoch_order(len(rows), seed, epoch).to(parts.device)]
        for chosen in order[: len(order) // size * size].split(size):
            yield parts.index_select(0, chosen), labels[chosen]

    return batches, len(rows) // size


@torch.no_grad()
def score(sweep: Sweep, parts: Tensor, labels: Tensor, rows: Tensor | None = None) -> list[HeadScore]:
    """Score each head on parts (N, P, D), or on some `rows` of them. An image whose logits are not finite counts as
    wrong."""
    device = next(sweep.parameters()).device
    rows = torch.arange(len(parts)) if rows is None else rows.cpu()
    sums = torch.zeros(3, len(sweep.settings), dtype=torch.float64, device=device)
    for chunk in rows.split(CHUNK):
        logits = sweep.logits(parts[chunk.to(parts.device)].to(device).float())  # (B, settings, K)
        truth = labels[chunk.to(labels.device)].to(device).view(-1, 1).expand(logits.shape[:2])
        best = logits.topk(min(5, logits.shape[-1])).indices == truth.unsqueeze(-1)
        best &= logits.isfinite().all(-1, keepdim=True)
        loss = functional.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view(truth.shape)
        sums += torch.stack([best[..., 0].sum(0), best.any(-1).sum(0), loss.sum(0)])
    top1, top5, loss = (sums / len(rows)).tolist()
    return [HeadScore(s, 100 * a, 100 * b, c) for s, a, b, c in zip(sweep.settings, top1, top5, loss, strict=True)]
