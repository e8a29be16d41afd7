"""A run of seconds that other tests read, images as people have them, and the command line called in this process."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite import cli

TINY = {
    "method.out_dim": 64,
    "method.hidden_dim": 32,
    "method.bottleneck_dim": 16,
    "method.warmup_teacher_temperature_epochs": 1,
    "backbone.patch_size": 8,
    "backbone.dim": 24,
    "backbone.depth": 2,
    "backbone.heads": 3,
    "data.name": "shapes",
    "data.image_size": 32,
    "data.length": 64,
    "data.test_length": 40,
    "data.batch_size": 16,
    "views.global_size": 32,
    "views.local_size": 16,
    "views.local_crops": 2,
    "optim.lr": 5e-3,
    "optim.warmup_epochs": 1,
    "trainer.max_epochs": 2,
    "trainer.log_every": 1,
    "trainer.progress": False,
    "trainer.accelerator": "cpu",
    "trainer.precision": "fp32",
    "trainer.threads": 1,
    "evaluate.bank_size": 0,
    "evaluate.test_size": 0,
    "run.report": False,
}
"""Four optimizer steps an epoch, two epochs; one thread, because sums over several round in another order."""
FLAT = {"data__name": "flat", "data__image_size": None, "data__length": None, "data__test_length": None}
FOLDER = FLAT | {"data__name": "folder", "data__batch_size": 8, "trainer__max_epochs": 1}
CPU = ("--gpus-per-node", 0)
"""Words of `vit-suite launch` for machines without a GPU."""
PROBED = "--data.name shapes --data.image_size 32 --data.length 100 --data.test_length 40 --precision fp32".split()
SWEEP = "--lr 0.01 0.3 --epochs 4 --batch_size 32".split()
"""Words of `vit-suite linear`: the images, and heads that train in a second."""


@pytest.fixture(autouse=True)
def threads():
    """Other tests get their threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def words(**options) -> list[str]:
    """Command-line words of the tiny run with `options` (`data__name="flat"`) in place of its own; None leaves one
    out."""
    merged = TINY | {key.replace("__", "."): value for key, value in options.items()}
    found = []
    for key, value in merged.items():
        if value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [f"--{key}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return found


class Said(NamedTuple):
    status: int
    out: str
    err: str
    """What was printed on stderr; log messages are apart."""
    log: str
    """Messages of the package, one a line."""


@pytest.fixture
def vit_suite(capsys, caplog):
    """`vit_suite("knn", "--checkpoint", path, ...)` runs a command line in this process."""

    def call(*arguments) -> Said:
        capsys.readouterr()
        caplog.clear()
        with caplog.at_level(logging.INFO, "vit_suite"):
            status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        said = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("vit_suite"))
        return Said(status, captured.out, captured.err, said)

    return call


@pytest.fixture
def pretrain(vit_suite, tmp_path):
    """`pretrain(output=..., data__name=...)` trains the tiny run with other options; `tmp_path / "run"` is its
    directory."""

    def call(output: Path | None = None, **options) -> Said:
        return vit_suite("pretrain", *words(run__output=output or tmp_path / "run", **options))

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A finished run directory; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert cli.main(["pretrain", *words(run__output=folder, saving__keep_every_epochs=1)]) == 0
    return folder


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory) -> Path:
    """Three epochs that nothing interrupted: what resumed runs must end with."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert cli.main(["pretrain", *words(run__output=folder, trainer__max_epochs=3)]) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    """The values of a column of metrics.csv, empty cells left out."""
    return [float(row[name]) for row in rows(folder) if row.get(name)]


def results(path: Path) -> list[dict]:
    """results.json of a run directory, or the file itself."""
    return json.loads((path / "results.json" if path.is_dir() else path).read_text())


def sha256(folder: Path) -> str:
    """Of the exported weights, as backbone.json has it."""
    return json.loads((folder / "backbone.json").read_text())["sha256"]


def picture(seed: int, height: int, width: int, brightness: float = 0.5) -> Image.Image:
    """A smooth RGB picture, unlike others."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray((random.random((5, 7, 3)) * 127 + brightness * 128).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def save_pictures(
    folder: Path, count: int, sizes=((30, 40), (48, 36), (64, 33)), brightness: float = 0.5, seed: int = 0
) -> None:
    """`count` JPEGs 000.jpg, ... in `folder`, of the sizes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(seed + index, *sizes[index % len(sizes)], brightness).save(folder / f"{index:03d}.jpg", quality=90)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Two classes, dark and bright, train and test, no two neighbours of one size."""
    root = tmp_path_factory.mktemp("photographs") / "animals"
    for split, count in (("train", 12), ("test", 6)):
        for label, brightness in (("dark", 0.1), ("bright", 0.9)):
            save_pictures(root / split / label, count, brightness=brightness, seed=1000 * len(split) + len(label))
    return root


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs on PATH that answer for SLURM: `slurm(sbatch="echo 17", squeue="...")`; without any there is no
    SLURM."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    def programs(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return programs


def squeue(*entries: tuple) -> str:
    """A script that prints job, state, restarts, time left, start, reason in squeue's columns."""
    lines = ["{:32}{:24}{:<12}{:24}{:24}{:80}".format(*entry) for entry in entries]
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


@pytest.fixture
def launch(vit_suite, tmp_path, monkeypatch):
    """`launch("--nodes", 2, data__length=64)` runs the command for the tiny run; `tmp_path / "run"` is its
    directory."""
    monkeypatch.chdir(tmp_path)

    def call(*launcher, output=None, **options):
        return vit_suite("launch", *launcher, *words(run__output=output or tmp_path / "run", **options))

    return call


@pytest.fixture
def probe(vit_suite, tiny_run, tmp_path):
    """Probes the tiny run on `shapes`, into scores.json; the words win over those."""

    def call(*words, checkpoint=tiny_run, data=PROBED, sweep=SWEEP):
        return vit_suite(
            "linear", "--checkpoint", checkpoint, "--output", tmp_path / "scores.json", *data, *sweep, *words
        )

    return call


def refused(said, *parts):
    assert (
        said.status == 2 and said.out == "" and said.err.strip().count("\n") == 0 and "vit-suite: error: " in said.err
    ), said.err
    for part in parts:
        assert part in said.err
