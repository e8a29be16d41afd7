"""Heads on frozen features against one torch.nn.Linear at a time, and the rules of the choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from vit_suite.config import BackboneConfig
from vit_suite.data.order import epoch_order
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features
from vit_suite.evaluation.linear import ProbeOptions, choose, linear_probe, split
from vit_suite.evaluation.linear_heads import HeadScore, Recipe, Setting, Sweep, fit, score, stored
from vit_suite.evaluation.linear_inputs import (
    PIXELS,
    Feature,
    backbone_subject,
    features_of,
    parts_of,
    pixel_subject,
    pools_of,
)
from vit_suite.models.backbone import Backbone

ONE, TWO = Feature("cls", 1), Feature("cls", 2)
COLUMNS = {ONE: [[1]], TWO: [[0, 1]]}
"""Two parts of 6 numbers; one head sees the second, the other both."""


def blobs(count: int, classes: int = 3, parts: int = 2, width: int = 6, noise: float = 1.0, seed: int = 0) -> Features:
    """Parts around a center for each class."""
    centers = torch.randn(classes, parts, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    drawn = torch.randn(count, parts, width, generator=torch.Generator().manual_seed(seed))
    return Features(centers[labels] + noise * drawn, labels, torch.arange(count), [])


# What a head sees
# ----------------------------------------------------------------------------------------------------------------------


def test_parts_of_each_pooling():
    assert parts_of(Feature("cls", 4), True, 0) == [[("cls", 4), ("cls", 3), ("cls", 2), ("cls", 1)]]
    assert parts_of(Feature("mean", 2), False, 0) == [[("mean", 2), ("mean", 1)]]
    assert parts_of(Feature("cls_mean", 1), True, 0) == [[("cls", 1), ("mean", 1)]]
    assert parts_of(Feature("cls_mean", 2), True, 3) == [[("cls", 2), ("cls", 1), ("mean", 1)]]
    assert parts_of(Feature("tokens", 1), True, 1) == [[("cls", 1)], [("register", 0)]]
    assert parts_of(Feature("tokens", 1), False, 2) == [[("register", 0)], [("register", 1)]]


@pytest.mark.parametrize("options", [{"registers": 2}, {"class_token": False, "pool": "mean"}])
def test_parts_are_the_normed_tokens_of_the_last_blocks(options):
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(patch_size=8, dim=24, depth=3, heads=3, image_size=[16, 16], **options)).train()
    features = features_of(backbone, pools_of(backbone), [1, 3], "x")
    subject = backbone_subject(backbone, features, [0.5] * 3, [0.2] * 3)
    images = torch.randn(5, 3, 16, 16)
    parts = subject.embed(images)
    assert parts.shape[1:] == subject.shape and not parts.requires_grad and backbone.training
    backbone.eval()
    prefix, after = backbone.prefix_tokens, []
    x, _ = backbone.embed(images)
    for block in backbone.vit.blocks:
        x = block(x)
        after.append(backbone.vit.norm(x).detach())
    cls, mean = [x[:, 0] for x in after], [x[:, prefix:].mean(1) for x in after]
    expected = {Feature("mean", 3): mean, Feature("mean", 1): mean[-1:]}
    if backbone.has_cls:
        expected |= {Feature("cls", 3): cls, Feature("cls", 1): cls[-1:]}
        expected |= {Feature("cls_mean", 3): [*cls, mean[-1]], Feature("cls_mean", 1): [cls[-1], mean[-1]]}
        tokens = [parts[:, columns] for columns in subject.columns[Feature("tokens", 1)]]
        for seen, place in zip(tokens, (0, 1, 2), strict=True):
            torch.testing.assert_close(seen[:, 0].float(), after[-1][:, place], atol=2e-3, rtol=2e-3)
    assert set(subject.columns) == {*expected, *([Feature("tokens", 1)] if backbone.has_cls else [])}
    for feature, pieces in expected.items():
        (columns,) = subject.columns[feature]
        torch.testing.assert_close(
            parts[:, columns].flatten(1).float(), torch.cat(pieces, 1), atol=2e-3, rtol=2e-3
        )  # 16 bits


def test_what_a_backbone_does_not_have():
    plain = Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[16, 16]))
    patches = Backbone(
        BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[16, 16], class_token=False, pool="mean")
    )
    assert pools_of(plain) == ["cls", "mean", "cls_mean"] and pools_of(patches) == ["mean"]
    with pytest.raises(UserError, match="pool tokens: the backbone of 'run' has no registers besides its CLS token"):
        features_of(plain, ["tokens"], [1], "run")
    with pytest.raises(UserError, match="pool cls: the backbone of 'run' has no CLS token; it has tokens for mean"):
        features_of(patches, ["cls"], [1], "run")
    with pytest.raises(UserError, match="blocks 3: the backbone of 'run' has 2"):
        features_of(plain, ["cls"], [1, 3], "run")


def test_features_that_are_not_finite_are_the_users_error():
    backbone = Backbone(BackboneConfig(patch_size=8, dim=24, depth=1, heads=3, image_size=[16, 16]))
    backbone.vit.norm.bias.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        backbone_subject(backbone, [ONE], [0.5] * 3, [0.2] * 3).embed(torch.zeros(1, 3, 16, 16))


def test_pixels_are_one_part():
    subject = pixel_subject(3, [2, 4], [0.5] * 3, [0.2] * 3)
    images = torch.randn(2, 3, 2, 4)
    assert subject.shape == (1, 24) and subject.columns == {PIXELS: [[0]]}
    torch.testing.assert_close(subject.embed(images)[:, 0].float(), images.flatten(1), atol=1e-3, rtol=1e-3)


# Training, against one plain layer at a time
# ------------------------------------------------------------------------------------------


def by_hand(train: Features, inputs, modules, optimizer, lr_at, epochs: int, batch: int, seed: int) -> None:
    """Train `modules`, one for each of `inputs` (columns), with their losses added."""
    step = 0
    for epoch in range(epochs):
        order = epoch_order(len(train.features), seed, epoch)
        for start in range(0, len(order) // batch * batch, batch):
            rows = order[start : start + batch]
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
            logits = [
                module(train.features[rows][:, columns].flatten(1))
                for columns, module in zip(inputs, modules, strict=True)
            ]
            loss = sum(functional.cross_entropy(part, train.labels[rows]) for part in logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def plain_head(heads, token: int, rate: int) -> nn.Module:
    """torch.nn layers with the first weights of one head of the stack."""

    def layer(weight, bias):
        linear = nn.Linear(*weight[token, :, rate].shape)
        linear.weight.data, linear.bias.data = (
            weight[token, :, rate].detach().T.clone(),
            bias[token, rate].detach().clone(),
        )
        return linear

    layers = ([layer(*heads.first), nn.Tanh()] if heads.first else []) + [layer(*heads.last)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("hidden", [0, 5])
def test_every_head_of_a_sweep_trains_as_it_would_alone(hidden):
    """Rates differ by a factor of 300 in one tensor; each equals torch.optim.SGD at its own rate, momentum and cosine
    included."""
    train, lrs, epochs, batch = blobs(50), (1e-3, 0.02, 0.3), 7, 16
    recipe = Recipe(lrs, epochs, batch, hidden_dim=hidden, seed=3)
    sweep = Sweep(COLUMNS, 6, 3, recipe)
    first = {(f, r): plain_head(heads, 0, r) for f, heads in zip(COLUMNS, sweep.heads, strict=True) for r in range(3)}
    assert sweep.settings == [Setting(lr, *feature) for feature in COLUMNS for lr in lrs]
    fit(sweep, *stored(train.features, train.labels, torch.arange(50), batch, 3))
    logits = sweep.logits(train.features)
    steps = epochs * (50 // batch)
    for place, setting in enumerate(sweep.settings):
        alone = first[setting.feature, lrs.index(setting.lr)]
        peak = setting.lr * batch / 256
        optimizer = torch.optim.SGD(alone.parameters(), lr=1, momentum=0.9)
        columns = COLUMNS[setting.feature]
        by_hand(
            train,
            columns,
            [alone],
            optimizer,
            lambda s, p=peak: p * (1 + math.cos(math.pi * s / steps)) / 2,
            epochs,
            batch,
            3,
        )
        expected = alone(train.features[:, columns[0]].flatten(1))
        torch.testing.assert_close(logits[:, place], expected, atol=2e-5, rtol=1e-4)
    assert (logits[:, 0] - logits[:, 2]).abs().max() > 0.01  # the rates did differ


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_sit_trains_a_head_on_each_token_and_averages_their_logits(name):
    """With AdamW as SiT does; with SGD, where a factor on the loss would show."""
    train, epochs, batch, feature, decay = blobs(48), 6, 16, Feature("tokens", 1), 0.1 * (name == "adamw")
    recipe = Recipe(
        (0.05,), epochs, batch, name, weight_decay=decay, warmup_epochs=2, min_lr=1e-4 * (name == "adamw"), seed=1
    )
    sweep = Sweep({feature: [[0], [1]]}, 6, 3, recipe)
    alone = [plain_head(sweep.heads[0], token, 0) for token in (0, 1)]
    fit(sweep, *stored(train.features, train.labels, torch.arange(48), batch, 1))
    weights, biases = ([p for m in alone for p in m.parameters() if p.ndim == n] for n in (2, 1))
    if name == "adamw":
        optimizer = torch.optim.AdamW(
            [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        )
    else:
        optimizer = torch.optim.SGD([*weights, *biases], momentum=0.9)
    peak, low, warmup, steps = 0.05 * batch / 256, recipe.min_lr, 6, 18

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * step / (warmup - 1)
        return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    by_hand(train, [[0], [1]], alone, optimizer, lr_at, epochs, batch, 1)
    expected = (alone[0](train.features[:, 0]) + alone[1](train.features[:, 1])) / 2
    torch.testing.assert_close(sweep.logits(train.features)[:, 0], expected, atol=2e-5, rtol=1e-4)


def test_adamw_takes_one_rate():
    with pytest.raises(UserError, match="2 learning rates, but this protocol trains with AdamW"):
        Sweep(COLUMNS, 6, 3, Recipe((0.1, 0.2), 1, optimizer="adamw")).optimizer()


def test_a_diverged_head_leaves_the_others_alone_and_scores_nothing():
    train = blobs(60)
    results = {}
    for lrs in ((0.1, 0.5), (0.1, 3e38, 0.5)):
        sweep = Sweep(COLUMNS, 6, 3, Recipe(lrs, 20, 256))
        fit(sweep, *stored(train.features, train.labels, torch.arange(60), 16, 0))
        results[lrs] = {found.setting: found for found in score(sweep, train.features, train.labels)}
    for setting, found in results[0.1, 0.5].items():
        other = results[0.1, 3e38, 0.5][setting]
        assert other.top1 == found.top1 > 60 and other.loss == pytest.approx(found.loss, rel=1e-4)
    bad = [found for setting, found in results[0.1, 3e38, 0.5].items() if setting.lr == 3e38]
    assert all(not math.isfinite(found.loss) and found.top1 == found.top5 == 0 for found in bad)


def test_an_epoch_is_every_image_once_in_whole_batches():
    parts, labels, rows = torch.arange(40.0).view(40, 1, 1), torch.arange(40), torch.arange(5, 28)
    batches, count = stored(parts, labels, rows, 10, seed=0)
    seen = [torch.cat([labels for _, labels in batches(epoch)]) for epoch in range(20)]
    assert count == 2 and all(len(epoch) == len(epoch.unique()) == 20 for epoch in seen) and not seen[0].equal(seen[1])
    assert torch.cat(seen).unique().equal(rows)  # what one epoch drops, another has
    assert all(x.flatten().long().equal(y) for x, y in batches(0))
    small, count = stored(parts, labels, rows, 256, seed=0)
    assert count == 1 and len(next(iter(small(0)))[1]) == 23


def test_score_counts_by_hand():
    sweep = Sweep({ONE: [[0]]}, 7, 7, Recipe((1.0,), 1))
    with torch.no_grad():
        sweep.heads[0].last[0].copy_(torch.eye(7).view(1, 7, 1, 7))
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(9000, 1)
    labels = torch.tensor([0, 1, 4, 5, 6]).repeat(1800)
    (found,) = score(sweep, logits.unsqueeze(1), labels)
    assert (found.top1, found.top5) == pytest.approx((20, 60))
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    (part,) = score(sweep, logits.unsqueeze(1), labels, torch.arange(2))
    assert (part.top1, part.top5) == (50, 100)


# The choice
# ----------------------------------------------------------------------------------------------------------------------


def head_score(lr: float, top1: float, loss: float) -> HeadScore:
    return HeadScore(Setting(lr, "cls", 1), top1, 100.0, loss)


def test_the_highest_top1_wins_then_the_lowest_loss():
    scores = [head_score(1, 50, 1.0), head_score(2, 60, 0.9), head_score(3, 60, 0.8), head_score(4, 99, math.nan)]
    assert choose(scores).setting.lr == 3
    with pytest.raises(UserError, match="all 1 heads have diverged; give smaller learning rates"):
        choose(scores[3:])


def test_the_held_out_share_is_stratified_disjoint_and_drawn_from_the_seed():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)
    inner, held = split(labels, 0.1, seed=0)
    assert labels[held].bincount().tolist() == [10, 5, 1] and torch.cat([inner, held]).sort().values.equal(
        torch.arange(160)
    )
    assert split(labels, 0.1, seed=0)[1].equal(held) and not split(labels, 0.1, seed=1)[1].equal(held)
    assert [len(part) for part in split(labels[:2], 0.1, 0)] == [1, 1]
    with pytest.raises(UserError, match="cannot be split"):
        split(labels[:1], 0.1, 0)


def test_held_out_images_are_not_trained_on():
    """60 images of random labels in 400 dimensions: any head learns those by heart and knows nothing of the others."""
    random = torch.Generator().manual_seed(0)
    train = Features(
        torch.randn(60, 1, 400, generator=random), torch.randint(0, 2, (60,), generator=random), torch.arange(60), []
    )
    result = linear_probe(
        train, train, Recipe((1.0, 2.0), 50, 64), columns={ONE: [[0]]}, options=ProbeOptions(validation_share=0.5)
    )
    assert result.top1 == 100 and all(found.top1 < 80 for found in result.held_out)


def test_test_is_asked_for_once_and_cannot_sway_the_choice():
    train, calls = blobs(120, noise=2.0), []
    held = {}

    def test(labels):
        def ask():
            calls.append(labels)
            return blobs(60, noise=2.0, seed=5)._replace(labels=labels)

        return ask

    recipe = Recipe((1e-4, 0.1, 1.0), 30, 32)
    for name, labels in {"right": torch.arange(60) % 3, "wrong": (torch.arange(60) + 1) % 3}.items():
        held[name] = linear_probe(train, test(labels), recipe, columns=COLUMNS)
    assert len(calls) == 2
    assert held["right"].held_out == held["wrong"].held_out and held["right"].setting == held["wrong"].setting
    assert held["right"].top1 > 70 > 40 > held["wrong"].top1
    assert len(held["right"].held_out) == 6
    assert held["right"].setting == choose(held["right"].held_out).setting


def test_the_winner_is_trained_on_all_training_images_and_repeats_exactly():
    train, test, recipe = blobs(90, noise=2.0), blobs(60, noise=2.0, seed=5), Recipe((0.01, 0.5), 20, 32, seed=4)
    first = linear_probe(train, test, recipe, columns=COLUMNS)
    assert linear_probe(train, test, recipe, columns=COLUMNS) == first and first.trained_on == 90
    winner = {first.setting.feature: COLUMNS[first.setting.feature]}
    alone = linear_probe(train, test, Recipe((first.setting.lr,), 20, 32, seed=4), columns=winner)
    assert alone.held_out == [] and (alone.top1, alone.top5) == (first.top1, first.top5)
    assert linear_probe(train, test, Recipe((0.01, 0.5), 20, 32, seed=5), columns=COLUMNS).held_out != first.held_out


def test_plain_features_from_python():
    train, test = (Features(found.features.flatten(1), *found[1:]) for found in (blobs(90), blobs(30, seed=5)))
    result = linear_probe(train, test, Recipe((0.1, 1.0), 30, 32))
    assert result.top1 > 80 and result.top5 == 100 and result.setting.pool == "features"
    with pytest.raises(ValueError, match="columns"):
        linear_probe(train, test, Recipe((0.1,), 1), columns=COLUMNS)


def test_labels_that_do_not_fit():
    train, test, recipe = blobs(30), blobs(30, seed=5), Recipe((0.1,), 1)
    with pytest.raises(UserError, match="2 of 30 training images have no label"):
        linear_probe(train._replace(labels=torch.tensor([-1, -1] + [0] * 28)), test, recipe, columns={ONE: [[0]]})
    with pytest.raises(UserError, match="test images have a label 3, but the training images have 3 classes, 0 to 2"):
        linear_probe(train, test._replace(labels=torch.tensor([3] * 30)), recipe, columns={ONE: [[0]]})
    with pytest.raises(UserError, match="30 of 30 test images have no label"):
        linear_probe(train, test._replace(labels=torch.tensor([-1] * 30)), recipe, columns={ONE: [[0]]})
    with pytest.raises(UserError, match="lr 3e\\+38 has diverged; give a smaller lr"):
        linear_probe(train, test, Recipe((3e38,), 20), columns={ONE: [[0]]})
