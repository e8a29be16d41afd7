"""Input that is wrong: one line that names it, status 2, and nothing left behind."""

from __future__ import annotations

import pytest

from tests.commands.conftest import save_pictures, words


@pytest.fixture
def refused(vit_suite, tmp_path, monkeypatch):
    """Runs `pretrain` with wrong options and checks the answer: `refused({"optim__lr": "fast"}, "parts of", "the
    message")`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIT_SUITE_DATA", raising=False)

    def call(options, *parts, extra=()):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        said = vit_suite("pretrain", *words(run__output="runs/new", **options), *extra)
        assert said.status == 2, said
        assert said.err.startswith("vit-suite: error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
        for part in parts:
            assert part in said.err, said.err
        assert {
            path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
        } == before  # no run directory, no log, nothing
        return said.err

    return call


# Keys and values
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--optim.lrr", "3"], "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        (["--optmi.lr", "3"], "unknown option '--optmi.lr'. Did you mean '--optim.lr'?"),
        (["--learning_rate", "3"], "unknown option '--learning_rate'. Did you mean '--optim.lr'?"),
        (["--trainer.max_epochs", "ten"], "--trainer.max_epochs: expected int (at least 1), got 'ten'"),
        (
            ["--views.global_scale", "0.4", "2"],
            "--views.global_scale: expected list of float (2 of them, least first, 0 to 1), got '2'",
        ),
        (["--trainer.precision", "bf61"], "expected one of auto, bf16, fp32, got 'bf61'. Did you mean 'bf16'?"),
        (
            ["--trainer.compile", "graphs"],
            "trainer.compile graphs captures CUDA graphs, and this training is on a CPU: use blocks",
        ),
        (["--data.decode", "gpu"], "data.decode is gpu, but this training is on a CPU: use data.decode cpu."),
        (
            ["--method.name", "dyno"],
            "--method.name: expected one of dino, dinov2, mae, sit, supervised, got 'dyno'. Did you mean 'dino'?",
        ),
    ],
)
def test_command_line(refused, extra, message):
    refused({}, message, extra=extra)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 3", ":2: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("optimm:\n  lr: 3", ":2: unknown key 'optimm.lr'. Did you mean 'optim.lr'?"),
        ("views:\n  jitter: often", ":2: views.jitter: expected float (0 to 1), got 'often'"),
        ("saving: {every_steps: [1, 2]}", ":1: saving.every_steps: expected int (at least 1), got "),
        ("method:\n  name: dino\n  out_dimm: 3", ":3: unknown key 'method.out_dimm'. Did you mean 'method.out_dim'?"),
    ],
)
def test_yaml(refused, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    refused({}, f"mine.yaml{message}", extra=["--config", "mine.yaml"])


def test_config_that_is_not_there(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    refused({}, "mime.yaml: no such config file. Did you mean 'mine.yaml'?", extra=["--config", "mime.yaml"])


# Data
# ----------------------------------------------------------------------------------------------------------------------

FILES = {"data__image_size": None, "data__length": None, "data__test_length": None}


def test_name_of_the_data_set(refused):
    refused(
        {"data__name": "cifar110"}, "unknown data set (data.name) 'cifar110'. Did you mean 'cifar10'?", "tiny_imagenet"
    )


@pytest.mark.parametrize("name", ["folder", "flat", "cifar10", "imagenet", "tiny_imagenet", "stl10", "food101"])
def test_root(refused, tmp_path, name):
    """Not given, missing, a file, empty, and of another layout."""
    options = FILES | {"data__name": name}
    refused(options, f"data set '{name}' needs a folder: set data.root, or the environment variable VIT_SUITE_DATA")
    refused(options | {"data__root": "nowhere"}, "data.root 'nowhere' does not exist")
    (tmp_path / "file").write_text("")
    refused(options | {"data__root": "file"}, "data.root 'file' is a file", "expects a folder")
    (tmp_path / "empty").mkdir()
    refused(options | {"data__root": "empty"}, "data.root 'empty' is empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("")
    refused(options | {"data__root": "other"}, "'other'", "expected", "found 1 file (readme.txt)")


def test_root_of_a_list(refused, tmp_path):
    options = FILES | {"data__name": "list", "data__root": "list.txt"}
    (tmp_path / "list.txt").write_text("a.jpg\tcat\nb.jpg\tdog\n")
    refused(options, "none of the first 2 paths in 'list.txt' exists", "First: a.jpg")
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    refused(options, "the list 'list.txt' names no images", "path<TAB>label")


def test_loose_images_where_class_folders_are_expected(refused, tmp_path):
    save_pictures(tmp_path / "loose", 3)
    refused(
        FILES | {"data__name": "folder", "data__root": "loose"},
        "no class folders with images in 'loose'",
        "data.name flat",
    )


def test_no_split_to_score(refused, tmp_path):
    save_pictures(tmp_path / "photos" / "train" / "cat", 20)
    options = FILES | {"data__name": "folder", "data__root": "photos"}
    refused(
        options,
        "'photos' has no split to score: expected test or val, found train",
        "data.test_split",
        "--evaluate.every_epochs 0",
    )


def test_batch(refused):
    refused({"data__batch_size": 65}, "data.batch_size 65 is larger than the data set of 64 training images")
    refused(
        {"trainer__accumulate": 3},
        "data.batch_size 16 (global) does not split evenly over 1 ranks x 3 accumulated",
        "15 or 18 would",
    )
    refused(
        {"trainer__devices": 3},
        "data.batch_size 16 (global) does not split evenly over 3 ranks x 1 accumulated",
        "15 or 18 would",
    )


def test_channels_without_statistics(refused):
    refused({"data__channels": 5}, "data.channels 5 has no published statistics: give data.mean with 5 values")
    refused({"data__mean": [0.5, 0.5]}, "data.mean has 2 values, but data.channels is 3")


# Sizes and networks
# -----------------------------------------------------------------------------------------------------------------


def test_sizes_and_the_patch(refused):
    refused(
        {"views__global_size": 30},
        "views.global_size 30x30 is not divisible by the patch size 8: nearest sides are 24 and 32",
    )
    refused(
        {"views__local_size": 20},
        "views.local_size 20x20 is not divisible by the patch size 8: nearest sides are 16 and 24",
    )
    refused({"views__local_size": 4}, "views.local_size 4x4 is smaller than a patch of 8 pixels")
    refused({"views__global_size": 4}, "views.global_size 4x4 is smaller than a patch of 8 pixels")
    refused(
        {"backbone__patch_size": 5},
        "views.global_size 32x32 is not divisible by the patch size 5: nearest sides are 30 and 35",
    )
    refused({"backbone__image_size": [32, 30]}, "image size 32x30 is not divisible by the patch size 8")


def test_backbones(refused):
    dims = dict.fromkeys(("backbone__patch_size", "backbone__dim", "backbone__depth", "backbone__heads"))
    message = "unknown backbone 'vit_tinny_patch16_224'. Did you mean 'vit_tiny_patch16_224'?"
    refused(dims | {"backbone__name": "vit_tinny_patch16_224"}, message)
    refused(dims | {"backbone__name": "resnet50"}, "backbone 'resnet50' is not of timm's VisionTransformer family")
    refused(
        dims | {"backbone__name": "vit_tiny_patch16_224", "views__global_size": 40},
        "views.global_size 40x40",
        "patch size 16",
    )
    refused({"backbone__heads": 5}, "backbone.dim 24 is not divisible by backbone.heads 5")
    refused({"backbone__pretrained": True}, "backbone.pretrained needs a timm name in backbone.name")


def test_trainer(refused):
    refused({"trainer__max_steps": 0}, "trainer.max_steps is 0; expected at least 1, or -1")


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_gpu_where_there_is_none(refused):
    refused({"trainer__accelerator": "gpu"}, "accelerator=gpu, but torch sees no GPU here")


def test_views_in_workers_that_do_not_exist(refused):
    refused(
        {"views__backend": "workers"},
        "views.backend is workers, but the images are held in memory",
        "--data.resident false",
    )
