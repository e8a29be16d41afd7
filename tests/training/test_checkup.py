"""Findings before a training: each kind is found where it is, and not where it is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import TINY, tiny_run, vit_suite, words  # noqa: F401 (fixtures)
from vit_suite.config import DataConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.parsing import load_config
from vit_suite.training import checkup
from vit_suite.training.parts import build_parts


def config(**options):
    return load_config(None, TINY | {key.replace("__", "."): value for key, value in options.items()})


def findings(tmp_path, ranks=1, **options):
    cfg = config(run__output=str(tmp_path / "run"), **options)
    data, method, *_ = build_parts(cfg, tmp_path)
    return {finding.what: finding for finding in checkup.of_run(cfg, data, method, ranks)}


def test_few_steps_an_epoch_are_said_with_a_batch_that_has_more(tmp_path):
    few = findings(tmp_path, data__length=450, data__batch_size=256)["steps"]
    assert few.level == "warning" and "make 1 step of 256 an epoch, 194 images sit out" in few.said
    assert few.mend == "Try data.batch_size 16: 28 steps an epoch."
    assert findings(tmp_path, data__length=450, data__batch_size=16)["steps"].level == "ok"


def test_a_warm_up_longer_than_half_the_run(tmp_path):
    assert "warm-up" in findings(tmp_path, optim__warmup_epochs=2, trainer__max_epochs=2)
    assert "warm-up" not in findings(tmp_path, optim__warmup_epochs=0.5, trainer__max_epochs=2)


def test_the_batch_of_a_rank_and_the_rate(tmp_path):
    said = findings(tmp_path, ranks=2, trainer__accumulate=2, optim__lr=1e-3)["batch"].said
    assert said.startswith("global batch 16 = 2 ranks x 2 accumulated x 4 images; peak learning rate 6.25e-05")


def test_crops_of_one_patch(tmp_path):
    assert findings(tmp_path, views__local_size=8)["crops"].level == "warning"
    assert "global 32 px = 4 x 4 patches of 8, local 16 px = 2 x 2" in findings(tmp_path)["crops"].said


def test_copies_that_a_loss_would_push_apart(tmp_path):
    all_found = findings(tmp_path, data__repeats=2, data__length=64, data__batch_size=16, method__koleo_weight=0.1)
    assert all_found["steps"].said == "64 images make 4 steps of 16 an epoch, which see 32 of them 2 times."
    found = all_found["copies"]
    assert found.level == "warning" and "KoLeo would push copies of one image apart" in found.said
    assert "copies" not in findings(tmp_path, data__repeats=2)


def test_a_disk_that_has_no_room(tmp_path, monkeypatch):
    assert findings(tmp_path)["disk"].level == "ok"
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: full)
    assert findings(tmp_path)["disk"].level == "error"


def test_the_room_is_what_checkpoints_take(tmp_path, tiny_run):  # noqa: F811
    """Within 20% of the file that a training wrote."""
    cfg = config(run__output=str(tmp_path))
    _, method, *_ = build_parts(cfg, tmp_path)
    said = checkup.of_disk(cfg, method).said
    need = float(said.split("checkpoints take ")[1].split()[0])
    assert "checkpoints take" in said and "MiB" in said
    assert need == pytest.approx(3 * (tiny_run / "checkpoints" / "last.ckpt").stat().st_size / 2**20, rel=0.2)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"SLURM_NTASKS": "", "SLURM_NODEID": "node3"}, []),
        ({"SLURM_NTASKS": "1"}, []),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}, ["not started by srun"]),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, ["without --ntasks-per-node"]),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, []),
    ],
)
def test_slurm(environment, expected):
    found = [finding.said for finding in checkup.of_environment(environment)]
    assert len(found) == len(expected) and all(word in said for word, said in zip(expected, found, strict=True))


def test_wandb_that_cannot_be_reached(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert [finding.level for finding in checkup.of_logger(config(logger__wandb=True))] == ["error"]
    assert [f.level for f in checkup.of_logger(config(logger__wandb=True, logger__wandb_offline=True))] == ["ok"]
    assert not list(checkup.of_logger(config()))


# Images


def make(root: Path, split: str, name: str, count: int, value: int | None = None) -> None:
    (root / split / name).mkdir(parents=True)
    for index in range(count):
        seed = hash((split, name, index)) % 2**32
        pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(
            root / split / name / f"{index}.png"
        )


def looked_at(root: Path) -> dict[str, checkup.Finding]:
    data = ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=1, resident=False))
    return {finding.what: finding for finding in checkup.of_images(data)}


def test_sizes_classes_and_duplicates(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            make(tmp_path, split, name, 3)
    found = looked_at(tmp_path)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert (
        "32 to 32 wide, 24 to 24 high" in found["images"].said and "2 classes of 3 to 3 images" in found["classes"].said
    )
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "b" / "copy.png")
    twins = looked_at(tmp_path)["duplicates"]
    assert twins.level == "warning" and "1 of 7 test and 6 training files" in twins.said and "copy.png" in twins.said


def test_uneven_classes_broken_and_black_files(tmp_path):
    make(tmp_path, "train", "many", 30)
    make(tmp_path, "train", "few", 2)
    make(tmp_path, "test", "many", 1)
    (tmp_path / "train" / "many" / "broken.png").write_bytes(b"no picture")
    found = looked_at(tmp_path)
    assert found["classes"].level == "warning" and "of 2 to 31 images" in found["classes"].said
    assert found["images"].level == "warning" and "broken.png" in found["images"].said
    make(tmp_path, "train", "night", 20, value=1)
    (tmp_path / "train" / "many" / "broken.png").unlink()
    black = looked_at(tmp_path)["images"]
    assert black.level == "warning" and "20 are nearly black or white" in black.said


# The command


def test_doctor_on_a_training(vit_suite, tmp_path):  # noqa: F811
    said = vit_suite("doctor", *words(run__output=tmp_path / "run"), "--steps", 1)
    lines = said.out.splitlines()
    assert said.status == 0 and not (tmp_path / "run").exists(), said.err
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning"}
    assert any(" time: " in line and " s a step of 16 images" in line for line in lines)
    assert " findings, " in lines[-1] and lines[-1].endswith("no error")


def test_doctor_on_a_checkpoint_and_a_folder(vit_suite, tiny_run, tmp_path):  # noqa: F811
    make(tmp_path / "photos", "train", "a", 2)
    make(tmp_path / "photos", "test", "a", 2)
    said = vit_suite("doctor", tiny_run, tmp_path / "photos")
    assert said.status == 0 and "width 24, depth 2, 3 heads, patch 8" in said.out and "data.name folder" in said.out


def test_doctor_on_a_list_and_on_a_pipe(vit_suite, tmp_path):  # noqa: F811
    make(tmp_path, "train", "a", 2)
    (tmp_path / "list.csv").write_text("path,label\ntrain/a/0.png,a\ntrain/a/1.png,a\n")
    said = vit_suite("doctor", tmp_path / "list.csv")
    assert said.status == 0 and "2 images to train on, read as data.name list" in said.out, said.out + said.err
    os.mkfifo(tmp_path / "pipe")
    said = vit_suite("doctor", tmp_path / "pipe")
    assert said.status == 2 and "is a pipe, a socket or a device" in said.err and said.err.count("\n") == 1


def test_doctor_finds_an_error_and_exits_with_2(vit_suite, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    said = vit_suite("doctor", tmp_path / "empty")
    assert said.status == 2 and said.out.startswith("error") and said.err.count("\n") == 1


def test_a_training_says_its_warnings_once(vit_suite, tmp_path):  # noqa: F811
    said = vit_suite("pretrain", *words(run__output=tmp_path / "run", trainer__max_epochs=1))
    assert said.log.count("steps: 64 images make 4 steps of 16 an epoch.") == 1


def test_words():
    assert checkup.amount(512) == "512 bytes" and checkup.amount(3 * 2**30) == "3.0 GiB"
    assert [checkup.spoken(s) for s in (5, 600, 7200, 864000)] == ["5 s", "10 minutes", "2.0 hours", "10.0 days"]
