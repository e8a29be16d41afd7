"""Every command of the documents: its options exist, and where it can be done on a few small images it runs.

The reader's folders (PHOTOS, CLASSES, ...) are a dozen generated images, their data sets are `shapes`, and trainings
are cut to one step of a tiny network. What needs a cluster, several processes, a download or hours is parsed only.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.documented import PAGES, ROOT, Shown, blocks, documented, scripts, words_of
from vit_suite import cli, registry
from vit_suite.data.shapes import ShapesSource
from vit_suite.errors import UserError
from vit_suite.parsing import load_config

PARSED = {
    "several processes": lambda shown: bool(shown.launcher),
    "a cluster": lambda shown: shown.line.startswith("launch") and "--status" not in shown.line,
    "hours, or a machine that this is not": lambda shown: bool(
        re.search(r"imagenet_|/lustre|SHARDS|fsdp2|--drill|continue_small|trainer\.devices|^demo", shown.line)
    ),
    "tests of their own, since what they import takes longer than the rest": lambda shown: bool(
        re.search(r"--format (onnx|huggingface)", shown.line)
    ),
    "images of one row, which tests/commands/test_one_row.py trains on": lambda shown: "SERIES" in shown.line,
    "a download, or a file of somebody else's": lambda shown: bool(
        re.search(r"timm:|\.pth|dinov2_vit|--start FILE|/dinov3", shown.line)
    ),
}
"""Why a command is parsed only -> whether this one is."""
MISTAKE = "learning_rate"
"""In the command that shows what a mistake answers."""
NAMES = {"NAME": "dino/smoke", "C": "dino/smoke", "recipe.yaml": "dino/smoke", "my.yaml": "dino/smoke"}
"""What words behind `--config` stand for."""
SHORT = {
    "dino": "--method.out_dim 32 --method.hidden_dim 16 --method.bottleneck_dim 8 --views.local_size 16",
    "sit": "",
    "supervised": "",
}
"""Options that make a step of a method cheap."""
STEP = (
    "--views.global_size 32 --data.batch_size 4 --trainer.max_steps 1 --trainer.progress false"
    " --trainer.accelerator cpu --evaluate.every_epochs 0 --optim.warmup_epochs 0 --run.report false"
)
NETWORK = "--backbone.patch_size 8 --backbone.dim 16 --backbone.depth 1 --backbone.heads 1"
SHAPES = "--data.name shapes --data.image_size 32 --data.test_length 8"


def checked(shown: Shown) -> None:
    """UserError when the command or one of its options is none, or a value does not convert."""
    command, *words = words_of(shown.line)
    row = cli.COMMANDS[command]
    if row.words and words and not words[0].startswith("-"):
        words = [f"--{row.words}", *words]
    for place, word in enumerate(words[:-1]):
        if word == "--config":
            words[place + 1] = NAMES.get(words[place + 1], words[place + 1])
    words = [word for word in words if word not in ("--help", "--print_config", "cluster.yaml")]
    try:
        options = registry.load(row.config)
        options = options.for_words(words) if hasattr(options, "for_words") else options  # `launch COMMAND`
        load_config(None, words, options)
    except UserError as error:
        if "missing required" not in str(error):
            raise


@pytest.mark.parametrize("shown", documented(), ids=lambda shown: f"{shown.page} {shown.line}"[:70])
def test_options_exist(shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    if MISTAKE in shown.line:
        with pytest.raises(UserError, match=r"Did you mean '--optim.lr'"):
            checked(shown)
    elif not shown.line.startswith(("COMMAND", "--")):  # the overview
        checked(shown)


@pytest.mark.parametrize("shown", scripts(), ids=lambda shown: f"{shown.page} {shown.line}"[:70])
def test_scripts_and_their_options_exist(shown):
    path, *words = shown.line.split()
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert f'"{option}"' in text or option[2:].replace("-", "_") in text, f"{path} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for block in blocks(page, ("python",)):
        if not block.startswith((" ", '"')):  # a piece of a class or of a table
            compile(block, str(page), "exec")


def small_files(folder: Path) -> None:
    """PHOTOS with masks, CLASSES in splits, a list: generated images of 40 px."""
    source = ShapesSource("train", 12, (40, 40))
    for name in ("PHOTOS", "MASKS_OR_BOXES", "photos"):
        (folder / name).mkdir()
    rows = ["filename,species"]
    for index in range(len(source)):
        picture = Image.fromarray(source.load(index).permute(1, 2, 0).numpy())
        kind = ("cat", "dog")[index % 2]
        name = f"{kind}.jpg" if index < 2 else f"{index}.jpg"
        for split in ("train", "test"):
            (folder / "CLASSES" / split / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "CLASSES" / split / kind / f"{index}.jpg", quality=95 if split == "train" else 90)
        if index < 6:
            picture.save(folder / "PHOTOS" / name)
            mask = Image.fromarray((source.mask(index).numpy() * 255).astype("uint8"))
            mask.save(folder / "MASKS_OR_BOXES" / f"{Path(name).stem}.png")
        picture.save(folder / "photos" / f"{index}.jpg")
        rows.append(f"{index}.jpg,{kind}")
    shutil.copytree(folder / "CLASSES", folder / "IMAGES")
    (folder / "photos" / "labels.csv").write_text("\n".join(rows) + "\n")


def made_small(line: str, made: set[str]) -> list[str]:
    """The words of a documented command, on small data, with a tiny network, for one step.

    `made` are the run directories that commands before write; the one that this command writes is added. Any other is
    the README's, `runs/photos`.
    """
    line = re.sub(r"--data\.name (cifar10|tiny_imagenet|stl10)( --data\.root \S+)?", SHAPES, line)
    line = re.sub(r"(--config \S+) --data\.root DIR", rf"\1 {SHAPES}", line)
    line = re.sub(r"--checkpoint C\b", "--checkpoint builtin:shapes", line).replace(" C ", " dino/smoke ")
    words = words_of(line)
    command = words[0]
    for place, word in enumerate(words):
        words[place] = NAMES.get(word, word) if words[place - 1] == "--config" else word
        if words[place - 1] == "--run.output":
            made |= {word} if command != "launch" else set()  # a job is only shown here, so it makes no run
        elif word.startswith("runs/") and words[place - 1] != "--output":
            words[place] = word if word in made else "runs/photos"
    if command in ("knn", "linear") and "--data.name" not in words:
        words += SHAPES.split()
    if "shapes" in words and command in ("knn", "linear", "finetune", "pretrain", "profile", "doctor"):
        words += ["--data.length", "160" if "--shots" in words else "24"]
    if command == "linear":
        words += ["--epochs", "1", "--shot_steps", "2"]
    if command in ("attention", "embed", "neighbours", "predict"):
        words += ["--overwrite"]
    if command == "finetune":
        words += [*STEP.split(), "--trainer.max_epochs", "1", "--run.overwrite"]
    if command in ("pretrain", "profile") or (command == "doctor" and "--config" in words):
        config = words[words.index("--config") + 1] if "--config" in words else ""
        named = words[words.index("--method.name") + 1] if "--method.name" in words else ""
        method = named or config.removeprefix("configs/").partition("/")[0] or "dino"
        batch = "--data.batch_size 8" if "trainer.accumulate" in line else ""
        options = f"{STEP} {SHORT[method]} {batch} --method.name {method}"
        options += "" if {"--backbone.name", "--start"}.intersection(words) else f" {NETWORK}"
        words += options.split()
        words += ["--run.overwrite"] if command == "pretrain" else ["--steps", "1"]
        words += ["--warmup", "1"] if command == "profile" else []
        if "--data.name" not in words:
            words += [*SHAPES.split(), "--data.length", "24"]
    return ["vit_tiny_patch16_224" if word == "vit_small_patch16_224" else word for word in words]


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys, caplog):
    """README's first, as a newcomer would: what its `pretrain` wrote is scored, drawn and reported on."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR)
    small_files(tmp_path)
    parsed: dict[str, int] = dict.fromkeys(PARSED, 0)
    ran: dict[str, int] = {}
    seconds: dict[str, float] = {}
    made: set[str] = set()
    failed = []
    for shown in documented():
        if shown.line.startswith(("COMMAND", "--")):
            continue
        if reason := next((reason for reason, holds in PARSED.items() if holds(shown)), None):
            parsed[reason] += 1
            continue
        words = made_small(shown.line, made)
        if "test.npz" in words and not Path("test.npz").exists():
            shutil.copy("train.npz", "test.npz")
        key = " ".join(words)
        if key in ran:
            continue
        before = time.process_time()
        ran[key] = cli.main(words)
        seconds[key] = time.process_time() - before
        said = capsys.readouterr().err.strip().splitlines()
        if ran[key] != (2 if MISTAKE in shown.line else 0):
            failed.append(f"{shown.page}: {key}: {ran[key]} {said[-1:]}")
    with capsys.disabled():
        only = ", ".join(f"{count} for {reason}" for reason, count in parsed.items() if count)
        print(f"\n{len(ran)} documented commands ran; {sum(parsed.values())} were parsed only: {only}")
        slowest = sorted(seconds, key=seconds.__getitem__)[-5:]
        print("\n".join(f"{seconds[key]:5.1f} s {key[:90]}" for key in slowest))
    assert not failed, "\n".join(failed)
    assert len(ran) > 30 and len(ran) > sum(parsed.values())
    for name in ("maps/index.html", "runs/photos/report.html", "runs/tuned/head.safetensors", "photos.parquet"):
        assert Path(name).is_file(), name
