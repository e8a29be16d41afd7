"""`vit-suite knn`: the table, results.json, every kind of checkpoint, and what cannot be scored."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import results
from vit_suite.data import reading
from vit_suite.data.shapes import ShapesSource
from vit_suite.evaluation.interval import wilson
from vit_suite.weights.checkpoint import load_backbone

SHAPES = [
    "--data.name",
    "shapes",
    "--data.image_size",
    32,
    "--data.length",
    64,
    "--data.test_length",
    40,
    "--precision",
    "fp32",
]


@pytest.fixture
def knn(vit_suite, tiny_run, tmp_path):
    """Scores the tiny run on `shapes`, into scores.json; the words win over those."""

    def call(*words, checkpoint=tiny_run, data=SHAPES):
        return vit_suite("knn", "--checkpoint", checkpoint, "--output", tmp_path / "scores.json", *data, *words)

    return call


def test_table_and_entry(knn, tiny_run, tmp_path):
    said = knn("--k", 10, 20, 64)
    assert said.status == 0 and said.err.count("error") == 0
    (entry,) = results(tmp_path / "scores.json")
    scores = entry["metrics"]["checkpoint"]
    title, header, _, row, interval, chance, last = said.out.splitlines()
    assert title == "shapes: top-1 % of 40 images, bank of 64, temperature 0.07"
    assert header.split() == ["kNN", "top-1", "%", "k=10", "k=20", "k=64"]
    assert row.split() == ["checkpoint", *(f"{scores[k]['top1']:.2f}" for k in ("k10", "k20", "k64"))]
    low, high = wilson(scores["k20"]["top1"], 40)
    assert scores["k20"]["top1_interval"] == [low, high] and low < scores["k20"]["top1"] < high
    assert interval.split()[:2] == ["95%", "interval"] and interval.split()[3] == f"{low:.1f}-{high:.1f}"
    assert chance.startswith("chance is 10.00% (10 classes)") and entry["metrics"]["chance"]["uniform"] == 10
    assert last == f"appended to {tmp_path}/scores.json"
    protocol = entry["protocol"]
    assert entry["task"] == "knn" and entry["sha256"] == load_backbone(tiny_run).sha256
    assert (protocol["data"], protocol["temperature"], protocol["k"], protocol["precision"]) == (
        "shapes",
        0.07,
        [10, 20, 64],
        "fp32",
    )
    assert protocol["bank"] == {"split": "train", "images": 64} and protocol["test"] == {"split": "test", "images": 40}
    assert protocol["trained_on"]["method"] == "dino" and protocol["data_options"]["image_size"] == 32


def test_numbers_are_those_of_a_vote_by_hand(knn, tiny_run, tmp_path):
    """Brute force over the same images: top-k of the cosine, exp(similarity / 0.07), the class with the largest sum."""
    assert knn("--k", 7, 20).status == 0
    loaded = load_backbone(tiny_run)
    features, labels = [], []
    for split, length in (("train", 64), ("test", 40)):
        source = ShapesSource(split, length, (32, 32), 3, 0)
        pixels = torch.stack([source.load(i) for i in range(length)]).float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (loaded.mean, loaded.std))
        with torch.no_grad():
            features.append(torch.nn.functional.normalize(loaded.backbone((pixels - mean) / std), dim=1))
        labels.append(torch.tensor([source.label(i) for i in range(length)]))
    similarity = features[1] @ features[0].T
    for k in (7, 20):
        values, places = similarity.topk(k, dim=1)
        votes = torch.zeros(40, 10).scatter_add_(1, labels[0][places], (values / 0.07).exp())
        top1 = 100 * (votes.argmax(1) == labels[1]).double().mean().item()
        scores = results(tmp_path / "scores.json")[0]["metrics"]["checkpoint"][f"k{k}"]
        # One image may sit on the fence between two ways to round.
        assert scores["top1"] == pytest.approx(top1, abs=2.6) and scores["top5"] >= scores["top1"]


def test_k_beyond_the_bank_is_clamped_and_said(knn, tmp_path):
    said = knn("--k", 10, 64, 100, 200)
    assert (
        said.status == 0
        and "k=100 (bank has 64)" in said.out
        and "k=200 (bank has 64)" in said.out
        and "k=10 (" not in said.out
    )
    scores = results(tmp_path / "scores.json")[0]["metrics"]["checkpoint"]
    assert scores["k100"] == scores["k64"] | {"used_k": 64} and "used_k" not in scores["k10"]
    assert "k 100 200: the bank has only 64 images" in said.log and "k 64: no class has more than 7" in said.log


def test_every_kind_of_file_gives_the_same_numbers(knn, tiny_run, tmp_path):
    kinds = [tiny_run, tiny_run / "checkpoints" / "last.ckpt", tiny_run / "backbone.safetensors"]
    for checkpoint in kinds:
        assert knn("--k", 5, 20, checkpoint=checkpoint).status == 0
    entries = results(tmp_path / "scores.json")
    assert len(entries) == 3
    assert len({entry["sha256"] for entry in entries}) == 1
    assert entries[0]["metrics"] == entries[1]["metrics"] == entries[2]["metrics"]


def test_a_bare_pth_gives_the_same_weights(vit_suite, pretrain, tmp_path):
    """Dimensions are read off the shapes; the heads are asked for, since no shape tells them."""
    assert pretrain(backbone__dim=64, backbone__heads=1, trainer__max_steps=2, evaluate__every_epochs=0).status == 0
    loaded = load_backbone(tmp_path / "run")
    torch.save(
        {"teacher": {f"module.backbone.{k}": v for k, v in loaded.backbone.vit.state_dict().items()}},
        tmp_path / "dino.pth",
    )
    options = [*SHAPES, "--k", 20, "--output", tmp_path / "scores.json"]
    for checkpoint in (tmp_path / "run", tmp_path / "dino.pth"):
        assert vit_suite("knn", "--checkpoint", checkpoint, "--checkpoint_heads", 1, *options).status == 0
    refused(vit_suite("knn", "--checkpoint", tmp_path / "dino.pth", *options), "give --checkpoint_heads")
    first, second = results(tmp_path / "scores.json")
    assert first["sha256"] == second["sha256"] == loaded.sha256


def test_baselines(knn, tiny_run, tmp_path):
    said = knn("--baselines", "--k", 20)
    assert [line.split()[0] for line in said.out.splitlines()[3:9:2]] == ["checkpoint", "untrained", "raw"]
    metrics = results(tmp_path / "scores.json")[0]["metrics"]
    assert metrics.pop("chance")["uniform"] == 10
    assert metrics.keys() == {"checkpoint", "untrained", "raw pixels"}
    assert all(0 <= scores["k20"]["top1"] <= scores["k20"]["top5"] <= 100 for scores in metrics.values())


def test_entries_are_appended_to_those_of_the_run(vit_suite, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = results(run)
    for k in (5, 20):
        assert vit_suite("knn", "--checkpoint", run, *SHAPES, "--k", k).status == 0
    entries = results(run)
    assert entries[:-2] == before and [entry["protocol"]["k"] for entry in entries[-2:]] == [[5], [20]]


@pytest.mark.parametrize("content", ["{", "{}", "\x00\x01", '"text"'])
def test_a_results_file_that_is_none_is_kept_and_said_before_scoring(knn, tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    said = knn()
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
    assert f"'{tmp_path}/scores.json' is no results file" in said.err and "--output" in said.err
    assert (tmp_path / "scores.json").read_text() == content


def test_folder_of_photographs(knn, photographs, tmp_path):
    said = knn("--k", 5, "--baselines", data=["--data.name", "folder", "--data.root", photographs])
    assert said.status == 0 and "animals: top-1 % of 12 images, bank of 24" in said.out
    assert results(tmp_path / "scores.json")[0]["metrics"]["raw pixels"]["k5"]["top1"] == 100  # dark against bright


def test_gray_backbone_reads_color_files_as_gray(vit_suite, pretrain, photographs, tmp_path):
    assert pretrain(data__channels=1, trainer__max_steps=1, evaluate__every_epochs=0).status == 0
    options = ["--data.name", "folder", "--data.root", photographs, "--k", 5, "--output", tmp_path / "scores.json"]
    assert vit_suite("knn", "--checkpoint", tmp_path / "run", *options).status == 0
    assert results(tmp_path / "scores.json")[0]["protocol"]["data_options"]["channels"] == 1


def test_five_channels_are_normalized_as_the_checkpoint_says(vit_suite, pretrain, tmp_path):
    """No data set has published statistics for five; the run was told some, and its checkpoint keeps them."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, level in (("low", 20), ("high", 200)):
            folder = tmp_path / "bands" / split / label
            folder.mkdir(parents=True)
            for index in range(8):
                np.save(folder / f"{index}.npy", random.integers(level, level + 40, (32, 32, 5), dtype=np.uint8))
    files = {"data__name": "folder", "data__root": tmp_path / "bands", "data__channels": 5, "data__batch_size": 8}
    none = dict.fromkeys(("data__image_size", "data__length", "data__test_length"))
    statistics = {"data__mean": 0.5, "data__std": 0.25, "views__gray": 0, "views__jitter": 0}
    assert pretrain(**files, **none, **statistics, trainer__max_epochs=1).status == 0
    options = [
        "--data.name",
        "folder",
        "--data.root",
        tmp_path / "bands",
        "--k",
        3,
        "--baselines",
        "--output",
        tmp_path / "scores.json",
    ]
    said = vit_suite("knn", "--checkpoint", tmp_path / "run", *options)
    assert said.status == 0, said.err
    assert results(tmp_path / "scores.json")[0]["metrics"]["raw pixels"]["k3"]["top1"] == 100
    assert results(tmp_path / "scores.json")[0]["protocol"]["data_options"]["mean"] == [0.5] * 5


def test_other_image_size(knn, tmp_path):
    assert knn("--image_size", 48, "--k", 20).status == 0
    assert "256/224 of [48, 48]" in results(tmp_path / "scores.json")[0]["protocol"]["view"]


# What cannot be scored
# ----------------------------------------------------------------------------------------------------------------


def refused(said, *parts):
    assert (
        said.status == 2 and said.out == "" and said.err.count("\n") == 1 and said.err.startswith("vit-suite: error: ")
    )
    for part in parts:
        assert part in said.err


def test_wrong_sizes_and_numbers(knn):
    refused(knn("--image_size", 30), "image_size 30x30 is not divisible by the patch size 8", "24 and 32")
    refused(knn("--image_size", 4), "image_size 4x4 is smaller than a patch of 8 pixels")
    refused(knn("--k", 0), "--k: expected list of int (at least 1), got '0'")
    refused(knn("--temperature", 0), "--temperature: expected float (at least 0.001), got '0'")


def test_unlabeled_data(knn, photographs):
    data = ["--data.name", "flat", "--data.root", photographs / "train"]
    refused(knn(data=data), "train", "no labels", "kNN")


def test_a_set_that_would_be_scored_on_itself(knn, photographs):
    data = ["--data.name", "folder", "--data.root", photographs / "train"]
    refused(
        knn(data=data), "train would be scored on the images that it learns from", "split 'all'", "--data.holdout 0.2"
    )
    refused(knn("--data.test_split", "train"), "scored on the images that it learns from, split 'train'")


def test_options_of_training_are_no_options_of_a_score(knn):
    for option in ("--data.channels", "--data.batch_size", "--data.order"):  # of training alone
        refused(knn(option, 1), f"unknown option '{option}'.")


def test_output_that_is_a_folder(knn, tmp_path):
    (tmp_path / "folder").mkdir()
    refused(knn("--output", tmp_path / "folder"), f"'{tmp_path}/folder' is a folder")


@pytest.mark.parametrize("command", ["knn", "attention"])
def test_checkpoints_that_are_none(vit_suite, tiny_run, photographs, tmp_path, command):
    """Truncated, something else, another architecture: the same sentence from both commands."""
    rest = SHAPES if command == "knn" else ["--images", photographs, "--output", tmp_path / "maps"]

    def load(path):
        return vit_suite(command, "--checkpoint", path, *rest)

    whole = (tiny_run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    refused(load(tmp_path / "cut.ckpt"), f"'{tmp_path}/cut.ckpt' is truncated: its end is missing")
    whole = (tiny_run / "backbone.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-50])
    refused(load(tmp_path / "cut.safetensors"), f"'{tmp_path}/cut.safetensors' is truncated or no safetensors file")
    (tmp_path / "text.pth").write_text("hello")
    refused(load(tmp_path / "text.pth"), f"'{tmp_path}/text.pth' is no checkpoint but text, which begins with 'hello'")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "mlp.pth")
    refused(load(tmp_path / "mlp.pth"), "holds no ViT", "1 tensors, the first 'fc.weight', but no 'cls_token'")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    refused(load(tmp_path / "weights.onnx"), "is not one of .safetensors, .ckpt, .pth")
    refused(load(tmp_path / "none.ckpt"), f"'{tmp_path}/none.ckpt' does not exist")
    content = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    content["vit_suite"]["backbone"]["depth"] = 3
    del content["state_dict"]["teacher.backbone.vit.norm.bias"]
    torch.save(content, tmp_path / "other.ckpt")
    refused(
        load(tmp_path / "other.ckpt"),
        "does not fit the architecture",
        "depth 3",
        "13 missing, first 'blocks.2.norm1.weight'",
    )
    content["vit_suite"]["backbone"] |= {"depth": 2, "dim": 48}
    torch.save(content, tmp_path / "wide.ckpt")
    refused(load(tmp_path / "wide.ckpt"), "describes backbone.dim as 48, but its weights have 24")
    assert not (tmp_path / "maps").exists()


def test_backbone_json_is_for_people_and_not_needed(vit_suite, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "backbone.json").write_text(json.dumps({"nonsense": 1}))
    assert load_backbone(run).sha256 == load_backbone(tiny_run).sha256


@pytest.mark.parametrize("workers,threads", [(0, set()), (1, {1}), (3, {3})])
def test_workers_decide_how_many_threads_decode(knn, photographs, monkeypatch, workers, threads):
    pools, original = set(), reading.ThreadPoolExecutor
    monkeypatch.setattr(reading, "ThreadPoolExecutor", lambda n, **more: pools.add(n) or original(n, **more))
    data = ["--data.name", "folder", "--data.root", photographs, "--data.resident", "false"]
    assert knn("--data.workers", workers, data=data).status == 0
    assert pools == threads


@pytest.mark.parametrize("resident", ["auto", "false"])
def test_counts_are_those_of_the_images_that_were_scored(knn, tmp_path, resident):
    root = tmp_path / "set"
    for split in ("train", "test"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(10):
                path = root / split / name / f"{i}.png"
                side = 32 if resident == "auto" else 32 + i  # of one size they are held in memory
                pixels = np.random.default_rng(i).integers(0, 255, (side, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                if i < 4:
                    path.write_bytes(b"junk")
    data = ["--data.name", "folder", "--data.root", root, "--data.max_corrupt", 0.5, "--data.resident", resident]
    said = knn(data=data)
    assert said.status == 0, said.err
    assert "top-1 % of 12 images, bank of 12" in said.out and "16 files do not decode and are left out" in said.out
    protocol = results(tmp_path / "scores.json")[0]["protocol"]
    assert protocol["bank"]["images"] == protocol["test"]["images"] == 12 and len(protocol["left_out"]) == 16
    assert all("cannot identify image file" in line for line in protocol["left_out"])
