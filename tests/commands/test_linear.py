"""`vit-suite linear`: tables, results.json, a frozen backbone, an unread test split, protocols, and what cannot be
probed."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.commands.conftest import PROBED, refused, results
from vit_suite.config import BackboneConfig
from vit_suite.data.shapes import ShapesSource
from vit_suite.evaluation import fewshot, linear, prober
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.evaluation.linear import linear_probe
from vit_suite.evaluation.linear_heads import Recipe
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone, save_backbone, weights_sha256

FEW = ["--shot_steps", 8, "--draws", 2]


def test_table_and_entry(probe, tiny_run, tmp_path):
    said = probe()
    assert said.status == 0, said.err
    (entry,) = results(tmp_path / "scores.json")
    scores = entry["metrics"]["checkpoint"]
    lines = said.out.splitlines()
    title = "shapes: linear heads on 100 images of train, scored on 40 of test; chance is 10.00% (10 classes)"
    assert lines[0].startswith(title) and entry["metrics"]["chance"]["uniform"] == 10
    header = ["protocol", "sweep", "top-1", "%", "top-5", "%", "top-1", "95%", "lr", "blocks", "pool"]
    assert lines[1].split() == header
    low, high = scores["top1_interval"]
    assert 0 <= low < scores["top1"] < high <= 100
    row = [
        "checkpoint",
        f"{scores['top1']:.2f}",
        f"{scores['top5']:.2f}",
        f"{low:.1f}-{high:.1f}",
        f"{scores['lr']:g}",
        str(scores["blocks"]),
        scores["pool"],
    ]
    assert lines[3].split() == row
    assert lines[5].split() == ["held", "out,", "top-1", "%", "lr", "0.01", "lr", "0.3"]
    names = [line.split("  ")[0] for line in lines[7:13]]
    assert names == [f"{pool}, {blocks}" for pool in ("cls", "mean", "cls_mean") for blocks in ("1 block", "2 blocks")]
    assert lines[-1] == f"appended to {tmp_path}/scores.json"
    assert len(scores["held_out"]) == 12 and scores["trained_on"] == 100
    best = max(scores["held_out"], key=lambda one: (one["top1"], -one["loss"]))
    assert {key: best[key] for key in ("lr", "pool", "blocks")} == {
        key: scores[key] for key in ("lr", "pool", "blocks")
    }
    protocol = entry["protocol"]
    assert entry["task"] == "linear" and entry["sha256"] == load_backbone(tiny_run).sha256
    assert protocol["train"] == {"split": "train", "images": 100} and protocol["test"] == {
        "split": "test",
        "images": 40,
    }
    assert (
        protocol["recipe"]["lr"] == [0.01, 0.3]
        and protocol["recipe"]["epochs"] == 4
        and protocol["validation_share"] == 0.1
    )
    assert (
        protocol["data"] == "shapes"
        and protocol["trained_on"]["method"] == "dino"
        and protocol["data_options"]["length"] == 100
    )
    assert "trained again on all" in protocol["retrained"] and "read once" in protocol["choice"]


def test_numbers_are_those_of_a_probe_from_python(probe, tiny_run, tmp_path):
    """CLS of the last block, one rate: what backbone(images) gives, without the command's parts."""
    assert probe("--lr", 0.3, "--blocks", 1, "--pool", "cls", "--epochs", 20).status == 0
    loaded = load_backbone(tiny_run)
    sources = (ShapesSource(split, length, (32, 32), 3, 0) for split, length in (("train", 100), ("test", 40)))
    train, test = (
        extract_features(
            loaded.backbone, s, 32, loaded.mean, loaded.std, options=FeatureOptions(precision="fp32", unit=False)
        )
        for s in sources
    )
    expected = linear_probe(train, test, Recipe((0.3,), 20, 32))
    scores = results(tmp_path / "scores.json")[0]["metrics"]["checkpoint"]
    assert scores["held_out"] == []  # nothing to choose, nothing held out
    assert scores["top1"] == pytest.approx(expected.top1, abs=2.6)  # 16 bits: one image may sit on the fence


@pytest.mark.parametrize(
    "words", [[], ["--augment", "true"], ["--shots", 2, *FEW], ["--head", "mlp", "--hidden_dim", 8]]
)
def test_the_backbone_is_frozen_bit_for_bit(probe, tiny_run, monkeypatch, words):
    """Weights and buffers, gradients, what wants gradients, and the mode of every module, though it was left in
    training mode."""
    loaded = load_backbone(tiny_run)
    vit = loaded.backbone.vit
    vit.register_buffer("running", torch.randn(3))
    vit.blocks[0].train()
    vit.cls_token.requires_grad_(False)
    state = {**dict(vit.named_parameters()), **dict(vit.named_buffers())}
    modes = [part.training for part in loaded.backbone.modules()]
    wants = [parameter.requires_grad for parameter in vit.parameters()]
    before, numbers = weights_sha256(state), {name: tensor.data_ptr() for name, tensor in state.items()}
    monkeypatch.setattr("vit_suite.commands.linear.load_backbone", lambda *_: loaded)
    said = probe(*words)
    assert said.status == 0, said.err
    after = {**dict(vit.named_parameters()), **dict(vit.named_buffers())}
    assert weights_sha256(after) == before and {name: tensor.data_ptr() for name, tensor in after.items()} == numbers
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert [parameter.requires_grad for parameter in vit.parameters()] == wants
    assert [part.training for part in loaded.backbone.modules()] == modes


@pytest.mark.parametrize(
    "words", [[], ["--augment", "true"], ["--shots", 2, *FEW], ["--lr", 0.3, "--blocks", 1, "--pool", "cls"]]
)
def test_no_test_image_is_read_before_the_choice(probe, monkeypatch, tmp_path, words):
    events = []
    load = ShapesSource.load
    monkeypatch.setattr(ShapesSource, "load", lambda self, index: events.append(self.split) or load(self, index))
    for module in (linear, fewshot):
        choose = module.choose
        monkeypatch.setattr(module, "choose", lambda scores, choose=choose: events.append("choice") or choose(scores))
        fit = module.fit
        monkeypatch.setattr(module, "fit", lambda *given, fit=fit: (fit(*given), events.append("heads"))[0])
    assert probe(*words).status == 0
    first = events.index("test")
    assert events.count("test") == 40 and "train" in events[:first] and "heads" in events[:first]
    single = "cls" in words
    assert "choice" not in events[first:] and ("choice" in events[:first]) == (not single)
    assert [entry["protocol"]["choice"].startswith("none") for entry in results(tmp_path / "scores.json")] == [single]


def test_wrong_test_labels_change_no_choice(probe, monkeypatch, tmp_path):
    assert probe("--epochs", 40).status == 0
    init = ShapesSource.__init__

    def scrambled(self, *given, **named):
        init(self, *given, **named)
        if self.split == "test":
            self.labels = (self.labels + 1) % 10

    monkeypatch.setattr(ShapesSource, "__init__", scrambled)
    assert probe("--epochs", 40).status == 0
    first, second = (entry["metrics"]["checkpoint"] for entry in results(tmp_path / "scores.json"))
    assert first["held_out"] == second["held_out"] and first["top1"] != second["top1"]
    assert (first["lr"], first["pool"], first["blocks"]) == (second["lr"], second["pool"], second["blocks"])


@pytest.mark.parametrize("words", [[], ["--augment", "true"], ["--shots", 2, 4, *FEW]])
def test_a_seed_repeats_and_another_does_not(probe, tmp_path, words):
    for seed in (0, 0, 1):
        assert probe("--seed", seed, *words).status == 0
    first, second, third = (entry["metrics"] for entry in results(tmp_path / "scores.json"))
    assert first == second != third


def test_augmented_views_are_drawn_anew_each_step(probe, monkeypatch, tmp_path):
    """Without augmentation the backbone runs once an image."""
    passes, draws = [], []
    tokens, alone = Backbone.tokens, prober.alone
    monkeypatch.setattr(
        Backbone, "tokens", lambda self, images, *rest: passes.append(len(images)) or tokens(self, images, *rest)
    )
    monkeypatch.setattr(prober, "alone", lambda *place: draws.append(place) or alone(*place))
    assert probe("--epochs", 6).status == 0
    assert sum(passes) == 140 and not draws  # train and test
    passes.clear()
    assert probe("--epochs", 6, "--augment", "true", "--seed", 3).status == 0
    assert sum(passes) == 6 * 64 + 10 + 40  # 2 batches of 32 of the 90 an epoch, 10 held out, test
    assert draws == [(32, 3, epoch, step) for epoch in range(6) for step in range(2)]
    entry = results(tmp_path / "scores.json")[-1]
    assert "the head trained without them is scored" in entry["protocol"]["retrained"]
    assert entry["metrics"]["checkpoint"]["trained_on"] == 90


def test_baselines(probe, tmp_path):
    said = probe("--baselines", "--memory_gb", 0.001)
    assert [line.split("  ")[0] for line in said.out.splitlines()[3:6]] == ["checkpoint", "untrained", "raw pixels"]
    metrics = results(tmp_path / "scores.json")[0]["metrics"]
    del metrics["chance"]
    assert metrics.keys() == {"checkpoint", "untrained", "raw pixels"} and metrics["raw pixels"]["pool"] == "pixels"
    assert all(len(one["held_out"]) == (2 if name == "raw pixels" else 12) for name, one in metrics.items())
    said = probe("--baselines", "--memory_gb", 0.00005)
    assert said.status == 0 and "raw pixels" not in said.out and "untrained" in said.out
    assert "raw pixels left out: features of 100 training images x 1 x 3072 numbers take 0.000572 GiB" in said.log


def test_baselines_leave_the_protocol_of_the_backbone(probe, tmp_path):
    """Raw pixels have one column, so with one rate nothing is chosen among them, but the backbone's pool is."""
    assert probe("--baselines", sweep=["--lr", 0.1, "--epochs", 1]).status == 0
    protocol = results(tmp_path / "scores.json")[0]["protocol"]
    assert protocol["choice"].startswith("winner on the held-out") and protocol["validation_share"] == 0.1


def test_transfer_to_photographs_of_many_sizes(probe, photographs, tmp_path):
    """Pretrained on generated images, probed on files that the workers decode, with crops and without."""
    data = ["--data.name", "folder", "--data.root", photographs, "--data.workers", 0, "--baselines"]
    for augment in ("false", "true"):
        said = probe("--augment", augment, "--epochs", 20, "--batch_size", 8, data=data)
        assert said.status == 0 and "animals: linear heads on 24 images of train, scored on 12 of test" in said.out, (
            said.err
        )
    for entry in results(tmp_path / "scores.json"):
        assert entry["metrics"]["raw pixels"]["top1"] == 100  # dark against bright
        assert entry["protocol"]["trained_on"]["data"] == "shapes" and entry["protocol"]["data"] == "animals"


def test_few_shot_tables_and_entries(probe, vit_suite, tiny_run, tmp_path):
    said = probe("--shots", 1, 4, "--draws", 3, "--baselines", "--shot_steps", 20)
    assert said.status == 0 and "on 3 draws from the 100 images of train" in said.out, said.err
    entry = results(tmp_path / "scores.json")[0]
    assert (
        entry["task"] == "linear few-shot" and entry["protocol"]["shots"] == [1, 4] and entry["protocol"]["draws"] == 3
    )
    one = entry["metrics"]["checkpoint"]["shots4"]
    assert one["top1_interval"][0] < one["top1"]["mean"] < one["top1_interval"][1]
    assert len(one["top1"]["draws"]) == 3 and one["top1"]["mean"] == pytest.approx(sum(one["top1"]["draws"]) / 3)
    row = next(line for line in said.out.splitlines() if line.startswith("checkpoint, 4 a class"))
    assert row.split()[4:7] == [f"{one['top1']['mean']:.2f}", "±", f"{one['top1']['std']:.2f}"]
    assert entry["protocol"]["recipe"]["steps"] == 20 and "held out, 1 a class" in said.out
    words = [
        "--checkpoint",
        tiny_run,
        *PROBED,
        "--k",
        5,
        20,
        "--output",
        tmp_path / "scores.json",
        "--shots",
        1,
        4,
        "--draws",
        3,
    ]
    said = vit_suite("knn", *words, "--baselines")
    assert said.status == 0 and "bank of 100: 3 draws from each class" in said.out, said.err
    entry = results(tmp_path / "scores.json")[1]
    scores = entry["metrics"]["raw pixels"]["shots1"]
    assert entry["task"] == "knn few-shot" and scores["k20"]["used_k"] == 10 and "used_k" not in scores["k5"]
    row = next(line for line in said.out.splitlines() if line.startswith("raw pixels, 1 a class"))
    assert row.split("  ")[-2].strip() == f"{scores['k5']['top1']['mean']:.2f} ± {scores['k5']['top1']['std']:.2f}"
    assert len(entry["metrics"]["checkpoint"]["shots4"]["k20"]["top5"]["draws"]) == 3


# Protocols
# ----------------------------------------------------------------------------------------------------------------------


def tiny_backbone(**options) -> Backbone:
    return Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[16, 16], **options))


@pytest.mark.parametrize("protocol", ["dino", "sit"])
def test_published_protocols_run(probe, tmp_path, protocol):
    save_backbone(tiny_backbone(registers=1), tmp_path / "sit", [0.5] * 3, [0.25] * 3, method="sit")
    said = probe("--protocol", protocol, checkpoint=tmp_path / "sit", sweep=["--epochs", 6, "--batch_size", 32])
    assert said.status == 0, said.err
    entry = results(tmp_path / "scores.json")[0]
    scores = entry["metrics"]["checkpoint"]
    assert (
        scores["held_out"] == []
        and scores["trained_on"] == 100
        and scores["pool"] == {"dino": "cls", "sit": "tokens"}[protocol]
    )
    assert "last epoch instead of the best on test" in entry["protocol"]["protocol"]
    assert "random resized crop" in entry["protocol"]["augment"]


def test_a_backbone_without_cls_is_probed_by_its_patches(probe, vit_suite, tmp_path):
    save_backbone(tiny_backbone(class_token=False, pool="mean"), tmp_path / "patches", [0.5] * 3, [0.25] * 3)
    said = probe(checkpoint=tmp_path / "patches")
    assert said.status == 0, said.err
    assert {one["pool"] for one in results(tmp_path / "scores.json")[0]["metrics"]["checkpoint"]["held_out"]} == {
        "mean"
    }
    refused(
        probe("--pool", "cls", checkpoint=tmp_path / "patches"),
        "pool cls: the backbone of",
        "has no CLS token; it has tokens for",
    )
    words = ["--checkpoint", tmp_path / "patches", *PROBED, "--k", 5, "--output", tmp_path / "scores.json"]
    assert vit_suite("knn", *words).status == 0
    assert (
        results(tmp_path / "scores.json")[1]["protocol"]["features"]
        == "mean of the patch tokens after the final norm, L2-normalized"
    )


def test_the_edge_of_the_sweep_is_said(probe):
    said = probe("--lr", 1e-6, 1e-5, 0.3, "--epochs", 20, "--pool", "cls")
    assert "the winner's lr 0.3 is the largest of the sweep: a larger one may score higher" in said.log


def test_a_rate_that_diverges_is_shown_and_kept_as_json(probe, tmp_path):
    said = probe("--lr", 0.1, "3e38", "--batch_size", 256)
    assert said.status == 0 and "diverged" in said.out, said.err
    text = (tmp_path / "scores.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    rows = json.loads(text)[0]["metrics"]["checkpoint"]["held_out"]
    assert all((row["loss"] is None) == (row["lr"] > 1) for row in rows)


# Real images
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif("VIT_SUITE_DATA" not in os.environ, reason="VIT_SUITE_DATA names no real images")
def test_raw_pixels_of_cifar10_score_above_chance(probe, tmp_path):
    data = ["--data.name", "cifar10", "--data.length", 2000, "--data.test_length", 500, "--baselines"]
    said = probe("--lr", 1e-3, 3e-3, "--epochs", 10, "--pool", "cls", "--blocks", 1, data=data)
    assert said.status == 0, said.err
    assert 20 < results(tmp_path / "scores.json")[0]["metrics"]["raw pixels"]["top1"] < 45
