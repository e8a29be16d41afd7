"""`finetune`: any checkpoint's backbone under a fresh head, by the trainer of `pretrain`."""

from __future__ import annotations

import pytest
import torch

from tests.commands.conftest import results, sha256
from tests.training.test_rundir import stop_after
from vit_suite.parsing import load_config
from vit_suite.training.keeper import Keeper
from vit_suite.weights.checkpoint import load_backbone
from vit_suite.weights.head import load_head

OPTIONS = {
    "data.name": "shapes",
    "data.image_size": 32,
    "data.length": 64,
    "data.test_length": 40,
    "data.batch_size": 16,
    "trainer.max_epochs": 2,
    "trainer.log_every": 1,
    "trainer.progress": False,
    "trainer.accelerator": "cpu",
    "trainer.precision": "fp32",
    "trainer.threads": 1,
    "optim.warmup_epochs": 1,
    "evaluate.bank_size": 0,
    "evaluate.test_size": 0,
}


@pytest.fixture
def finetune(vit_suite, tmp_path):
    """`finetune(checkpoint, optim__lr=0.0)` fine-tunes for seconds; `tmp_path / "tuned"` is its directory."""

    def call(checkpoint, *extra, output=None, **options):
        merged = (
            OPTIONS
            | {"run.output": output or tmp_path / "tuned"}
            | {key.replace("__", "."): value for key, value in options.items()}
        )
        found = [
            part for key, value in merged.items() if value is not None for part in (f"--{key}", str(value).lower())
        ]
        return vit_suite("finetune", "--checkpoint", checkpoint, *found, *extra)

    return call


def test_starts_from_the_checkpoint(finetune, tiny_run, tmp_path):
    """At a learning rate of 0 the backbone that comes out is the one that went in; the head is new."""
    said = finetune(tiny_run, optim__lr=0.0, optim__min_lr=0.0)
    assert said.status == 0, said
    assert sha256(tmp_path / "tuned") == sha256(tiny_run)
    assert load_head(tmp_path / "tuned")[0].weight.shape == (10, 24)
    entry = results(tmp_path / "tuned")[0]
    assert entry["task"] == "finetune" and entry["metrics"]["top1"] >= 0 and "val_top1" in entry["metrics"]
    start = load_backbone(tiny_run)
    tuned = load_backbone(tmp_path / "tuned")
    assert (tuned.mean, tuned.std, tuned.image_size) == (start.mean, start.std, start.image_size)


@pytest.mark.parametrize("fate", ["deleted", "rewritten"])
def test_the_checkpoint_is_read_once(finetune, tiny_run, tmp_path, monkeypatch, fate):
    """What happens to its file while the training runs changes nothing, and the hash that is recorded is that of the
    weights it started from."""
    import shutil

    from vit_suite.weights import checkpoint as weights

    source = tmp_path / "start.safetensors"
    shutil.copy(tiny_run / "backbone.safetensors", source)
    shutil.copy(tiny_run / "backbone.json", source.with_suffix(".json"))
    before, reads = sha256(tiny_run), []
    epoch_end, load = Keeper.on_train_epoch_end, weights.load_backbone

    def meanwhile(self, trainer, module):
        epoch_end(self, trainer, module)
        if source.exists():
            source.unlink()
            source.with_suffix(".json").unlink()
        if fate == "rewritten":
            other = load(tiny_run).untrained(seed=7)
            weights.save_backbone(other.backbone, tmp_path / "other", other.mean, other.std)
            shutil.copy(tmp_path / "other" / "backbone.safetensors", source)

    def counted(*arguments, **options):
        reads.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(Keeper, "on_train_epoch_end", meanwhile)
    for module in ("vit_suite.commands.finetune", "vit_suite.training.run"):
        monkeypatch.setattr(f"{module}.load_backbone", counted)
    assert finetune(source, trainer__max_epochs=1).status == 0
    (entry,) = results(tmp_path / "tuned")
    assert entry["protocol"]["start_sha256"] == before and entry["protocol"]["start"] == str(source)
    assert len(reads) == 1


def test_trains_all_layers_the_first_slowly(finetune, tiny_run, tmp_path):
    assert finetune(tiny_run, optim__layer_decay=0.1, optim__lr=0.02).status == 0
    start, tuned = (load_backbone(folder).backbone.vit.state_dict() for folder in (tiny_run, tmp_path / "tuned"))
    moved = [
        (tuned[name] - start[name]).abs().mean().item()
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "norm.weight")
    ]
    assert moved == sorted(moved) and moved[0] > 0 and moved[3] > 10 * moved[1]


def test_recipe_and_what_is_recorded(finetune, tiny_run, tmp_path):
    assert finetune(tiny_run, trainer__max_epochs=1, backbone__drop_path=0.2, backbone__checkpointing=True).status == 0
    cfg = load_config(tmp_path / "tuned" / "config.yaml")
    assert (cfg.optim.layer_decay, cfg.optim.lr, cfg.method.ema, cfg.method.name) == (0.75, 5e-4, 0.0, "supervised")
    assert cfg.start == str(tiny_run)
    assert (cfg.backbone.drop_path, cfg.backbone.checkpointing) == (0.2, True)
    assert (cfg.backbone.dim, cfg.backbone.depth, cfg.views.global_size) == (24, 2, 32)


def test_another_size_resizes_the_positions(finetune, tiny_run, tmp_path):
    assert (
        finetune(tiny_run, views__global_size=48, optim__lr=0.0, optim__min_lr=0.0, trainer__max_epochs=1).status == 0
    )
    start, tuned = load_backbone(tiny_run).backbone, load_backbone(tmp_path / "tuned").backbone
    assert start.native_grid == (4, 4) and tuned.native_grid == (6, 6)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(tuned(images), start(images), atol=1e-5, rtol=1e-5)


def test_resumes_and_says_so_when_complete(finetune, tiny_run, monkeypatch, tmp_path):
    assert finetune(tiny_run, output=tmp_path / "straight").status == 0
    stop_after(monkeypatch, 3)
    assert finetune(tiny_run, saving__every_steps=1).status == 1
    assert "resuming" in finetune(tiny_run, saving__every_steps=1).log
    assert sha256(tmp_path / "tuned") == sha256(tmp_path / "straight")
    again = finetune(tiny_run)
    assert again.status == 0 and "is complete" in again.log and "test: top-1" in again.log


def test_from_a_run_that_was_fine_tuned_with_other_classes(finetune, tiny_run, tmp_path):
    """The head of the checkpoint is not taken, so its number of classes does not matter."""
    from tests.commands.conftest import save_pictures

    for split in ("train", "test"):
        for name, brightness in (("dark", 0.1), ("bright", 0.9)):
            save_pictures(tmp_path / "animals" / split / name, 8, brightness=brightness)
    assert finetune(tiny_run, trainer__max_epochs=1).status == 0
    options = {
        "data__name": "folder",
        "data__root": tmp_path / "animals",
        "data__length": None,
        "data__test_length": None,
    }
    said = finetune(
        tmp_path / "tuned", output=tmp_path / "two", data__image_size=None, trainer__max_epochs=1, **options
    )
    assert said.status == 0, said
    assert load_head(tmp_path / "two")[1] == ["bright", "dark"]


# Refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--backbone.dim", "48"],
            "backbone.dim is 48, but the backbone of '{run}' has 24: leave it out, the checkpoint decides.",
        ),
        (
            ["--backbone.positions", "sincos_2d"],
            "backbone.positions is sincos_2d, but the backbone of '{run}' has learned",
        ),
        (
            ["--backbone.pretrained", "true"],
            "backbone.pretrained asks for timm's weights, but training starts from '{run}'",
        ),
        (["--start", "other"], "unknown option '--start'."),
        (["--method.name", "dino"], "--method.name: expected supervised, got 'dino'"),
        (["--views.global_size", "30"], "is not divisible by the patch size 8"),
    ],
)
def test_contradictions(finetune, tiny_run, tmp_path, extra, message):
    said = finetune(tiny_run, *extra)
    assert said.status == 2 and message.format(run=tiny_run) in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "tuned").exists()


def test_options_that_agree_are_taken(finetune, tiny_run):
    assert finetune(tiny_run, "--backbone.dim", "24", "--backbone.mlp_ratio", "4", trainer__max_epochs=1).status == 0


def test_no_checkpoint(finetune, vit_suite, tmp_path):
    said = finetune(tmp_path / "nothing")
    assert said.status == 2 and "does not exist" in said.err
    assert "missing required option --checkpoint" in vit_suite("finetune").err


def test_another_checkpoint_in_the_same_directory(finetune, tiny_run, tmp_path):
    assert finetune(tiny_run, trainer__max_epochs=1).status == 0
    said = finetune(tiny_run / "backbone.safetensors", trainer__max_epochs=1)
    assert said.status == 2 and f"holds a run with start {tiny_run}, not {tiny_run}/backbone.safetensors" in said.err
