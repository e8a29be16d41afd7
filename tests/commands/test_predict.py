"""`vit-suite predict`: the classes of a head, on images as people have them, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.commands.conftest import save_pictures, sha256
from vit_suite.data.decode import decode
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.checkpoint import load_backbone
from vit_suite.weights.head import load_head, save_head

CLASSES = ["cat", "=SUM(A1)", "bird, small"]


@pytest.fixture(scope="module")
def named_run(tiny_run, tmp_path_factory):
    """A run directory with a head of three classes (that no training made: what a head says is arithmetic)."""
    folder = tmp_path_factory.mktemp("named") / "run"
    shutil.copytree(tiny_run, folder)
    torch.manual_seed(0)
    head = nn.Linear(24, 3)
    save_head(head, CLASSES, folder, sha256(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """13 pictures, one of them broken, one whose name a spreadsheet would run."""
    root = tmp_path / "images"
    save_pictures(root, 12)
    (root / "005b.jpg").write_bytes((root / "005.jpg").read_bytes()[:200])
    (root / "011.jpg").rename(root / "=cmd.jpg")
    return root


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words(run, folder, output, *more):
    where = ["--checkpoint", run, "--images", folder, "--output", output]
    return ["predict", *where, "--precision", "fp32", "--batch_size", 3, *more]


def test_classes_are_those_of_the_head(vit_suite, named_run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    said = vit_suite(*words(named_run, "images", "labels.csv", "--top", 2))
    assert said.status == 0, said.err
    loaded, (head, classes, _) = load_backbone(named_run), load_head(named_run)
    found = table(tmp_path / "labels.csv")
    assert list(found[0]) == ["path", "class", "number", "probability", "class_2", "number_2", "probability_2"]
    names = ["=cmd.jpg" if number == 11 else f"{number:03}.jpg" for number in range(12)]
    assert [row["path"] for row in found] == [f"images/{name}" for name in sorted(names)]
    for row in found:
        view = eval_view([torch.from_numpy(decode(row["path"]).copy())], loaded.image_size, loaded.mean, loaded.std)
        with torch.no_grad():
            shares = head(loaded.backbone(view)).softmax(1)[0]
        best = shares.argsort(descending=True)[:2].tolist()
        assert [int(row["number"]), int(row["number_2"])] == best
        assert row["class"].lstrip("'") == classes[best[0]]
        assert float(row["probability"]) == pytest.approx(float(shares[best[0]]), abs=1e-5)
        assert float(row["probability_2"]) == pytest.approx(float(shares[best[1]]), abs=1e-5)
    assert len({row["probability"] for row in found}) == 12
    assert not any(cell.startswith("=") for row in found for cell in row.values())  # `'=SUM(A1)` is no formula
    assert "12 images in labels.csv: " in said.out and "do not decode: 1, listed in labels.quarantine.txt" in said.out
    assert "005b.jpg" in (tmp_path / "labels.quarantine.txt").read_text()


def test_a_data_set_a_list_and_threads(vit_suite, named_run, folder, tmp_path):
    set_words = ["--data.name", "shapes", "--data.image_size", 32, "--data.test_length", 10]
    said = vit_suite("predict", "--checkpoint", named_run, *set_words, "--output", tmp_path / "set.csv")
    assert said.status == 0 and len(table(tmp_path / "set.csv")) == 10
    (tmp_path / "list.txt").write_text("images/003.jpg\nimages/001.jpg\n")
    assert vit_suite(*words(named_run, tmp_path / "list.txt", tmp_path / "list.csv")).status == 0
    assert [row["path"].rpartition("/")[2] for row in table(tmp_path / "list.csv")] == ["003.jpg", "001.jpg"]
    for workers in (1, 3):
        assert vit_suite(*words(named_run, folder, tmp_path / f"{workers}.csv", "--workers", workers)).status == 0
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()


def test_what_is_refused_in_one_sentence(vit_suite, named_run, tiny_run, folder, tmp_path):
    def says(*arguments):
        said = vit_suite(*arguments)
        assert said.status == 2 and said.err.count("error: ") == 1, said.err
        return said.err

    out = tmp_path / "labels.csv"
    assert "holds no head" in (error := says(*words(tiny_run, folder, out))) and "vit-suite finetune" in error
    assert "holds no head" in says(*words("builtin:shapes", folder, out))
    assert "does not exist. Did you mean" in says(*words(named_run, tmp_path / "image", out))
    assert "no images to name classes of" in says("predict", "--checkpoint", named_run, "--output", out)
    assert "expected the ending .csv" in says(*words(named_run, folder, tmp_path / "labels.txt"))
    other = tmp_path / "other"
    shutil.copytree(named_run, other)
    shutil.copy(named_run / "head.safetensors", other)
    described = json.loads((other / "backbone.json").read_text())
    head, classes, _ = load_head(other)
    save_head(head, classes, other, described["sha256"][::-1])
    assert "trained on other weights" in says(*words(other, folder, out))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no image")
    assert "none of the 1 images" in says(*words(named_run, broken, out))
    assert not out.exists() and not out.with_suffix(".quarantine.txt").exists()
    out.write_text("mine")
    assert "exists; name another, or give --overwrite" in says(*words(named_run, folder, out))
    assert out.read_text() == "mine"


@pytest.mark.slow
def test_ranks_write_the_file_of_one_process(named_run, folder, tmp_path):
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["-m", "vit_suite", *map(str, words(named_run, folder, tmp_path / f"{ranks}.csv"))]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
