"""`vit-suite embed` and `vit-suite neighbours` on folders as people have them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.commands.conftest import picture, save_pictures
from vit_suite.config import BackboneConfig
from vit_suite.data.decode import decode
from vit_suite.evaluation import embedding, embedding_files
from vit_suite.evaluation.embedding_files import read_embeddings
from vit_suite.models.backbone import Backbone
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.checkpoint import load_backbone, save_backbone


@pytest.fixture
def folder(tmp_path):
    """13 pictures, one of them broken."""
    root = tmp_path / "images"
    save_pictures(root, 12)
    (root / "005b.jpg").write_bytes((root / "005.jpg").read_bytes()[:200])
    return root


@pytest.fixture
def run(vit_suite, tiny_run, folder, tmp_path):
    """`run("out.npz", "--features", "mean")` embeds the folder."""

    def call(output, *words, images=folder):
        where = ["--checkpoint", tiny_run, "--images", images, "--output", tmp_path / output]
        return vit_suite("embed", *where, "--batch_size", 3, "--precision", "fp32", *words)

    return call


def expected(run, folder, kind):
    """Features by another road: picture by picture, straight from the backbone."""
    loaded = load_backbone(run)
    found = []
    for path in sorted(folder.glob("*.jpg")):
        if path.name == "005b.jpg":
            continue
        image = torch.from_numpy(np.array(decode(path), order="C"))
        with torch.no_grad():
            tokens = loaded.backbone.tokens(eval_view([image], loaded.image_size, loaded.mean, loaded.std))
        parts = {"cls": [tokens.cls], "mean": [tokens.patches.mean(1)]}
        parts |= {"both": parts["cls"] + parts["mean"], "patches": [tokens.patches]}
        found.append(torch.cat(parts[kind], 1)[0])
    return torch.stack(found)


@pytest.mark.parametrize("ending", ["parquet", "npz", "npy", "csv"])
def test_every_format_holds_the_same(run, folder, tiny_run, tmp_path, ending):
    said = run(f"out.{ending}")
    assert said.status == 0, said.err
    assert said.out.startswith("12 images (") and "a second" in said.out and "13/13" not in said.err
    assert f"do not decode: 1, listed in {tmp_path}/out.quarantine.txt" in said.out
    found = read_embeddings(tmp_path / f"out.{ending}")
    torch.testing.assert_close(found.features, functional.normalize(expected(tiny_run, folder, "cls"), dim=1))
    assert found.columns.paths == [f"{folder}/{number:03d}.jpg" for number in range(12)]
    assert found.columns.sizes[:3].tolist() == [[30, 40], [48, 36], [64, 33]]
    assert set(found.columns.labels.tolist()) == {-1} and set(found.columns.classes) == {""}
    about = json.loads((tiny_run / "backbone.json").read_text())
    assert found.protocol["sha256"] == about["sha256"] and found.protocol["kind"] == "cls"
    assert not (tmp_path / f"out.{ending}.parts").exists()


@pytest.mark.parametrize("kind", ["mean", "both"])
def test_kinds(run, folder, tiny_run, tmp_path, kind):
    assert run("out.npz", "--features", kind, "--normalize", "false").status == 0
    torch.testing.assert_close(
        read_embeddings(tmp_path / "out.npz").features, expected(tiny_run, folder, kind), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("output", ["tokens", "tokens.zarr"])
def test_patch_tokens(run, folder, tiny_run, tmp_path, output):
    assert run(output, "--features", "patches", "--normalize", "false").status == 0
    with (tmp_path / output / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12 and table[6]["path"] == f"{folder}/006.jpg"
    if output.endswith(".zarr"):
        zarr = pytest.importorskip("zarr")
        tokens = np.asarray(zarr.open_array(os.fspath(tmp_path / output), mode="r"))
    else:
        tokens = np.stack([np.load(tmp_path / output / row["file"])["tokens"] for row in table])
    assert tokens.shape == (12, 4, 4, 24) and tokens.dtype == np.float16
    np.testing.assert_allclose(
        tokens.reshape(12, 16, 24), expected(tiny_run, folder, "patches").numpy(), rtol=2e-3, atol=2e-3
    )
    assert json.loads((tmp_path / output / "protocol.json").read_text())["kind"] == "patches"


def test_labels_of_a_data_set(vit_suite, tiny_run, photographs, tmp_path):
    words = ["--data.name", "folder", "--data.root", photographs, "--data.test_split", "train"]
    assert vit_suite("embed", "--checkpoint", tiny_run, *words, "--output", tmp_path / "a.csv").status == 0
    found = read_embeddings(tmp_path / "a.csv")
    assert found.columns.labels.tolist() == [0] * 12 + [1] * 12
    assert found.columns.classes == ["bright"] * 12 + ["dark"] * 12


def bytes_of(output):
    """Bytes of a file, or of every file of a folder by its name."""
    if output.is_file():
        return output.read_bytes()
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_ranks_and_threads_write_the_bytes_of_one(run, tiny_run, folder, tmp_path):
    """A file of rows, and a .zarr that all threads and ranks write to."""
    where = [
        "embed",
        "--checkpoint",
        str(tiny_run),
        "--images",
        str(folder),
        "--batch_size",
        "3",
        "--precision",
        "fp32",
    ]
    kinds = {"parquet": ["--features", "cls"], "zarr": ["--features", "patches"]}
    commands = [[*where, *words, "--output", str(tmp_path / f"two.{kind}")] for kind, words in kinds.items()]
    program = f"from vit_suite.cli import main; raise SystemExit(max(map(main, {commands})))"
    job = ["--nproc-per-node", "2", "--standalone", "--no-python", sys.executable, "-c", program]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run([*launcher, *job], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind, words in kinds.items():
        for name, workers in (("one", 1), ("three", 3)):
            assert run(f"{name}.{kind}", "--workers", workers, *words).status == 0
        one = bytes_of(tmp_path / f"one.{kind}")
        assert bytes_of(tmp_path / f"three.{kind}") == one and bytes_of(tmp_path / f"two.{kind}") == one


@pytest.mark.parametrize(("name", "kind"), [("out.npz", "cls"), ("out.zarr", "patches")])
def test_a_stopped_run_goes_on(run, tmp_path, monkeypatch, name, kind):
    """Parts of one batch; the third batch is interrupted."""
    if kind == "patches":
        pytest.importorskip("zarr")
    whole, words = tmp_path / f"whole{name}", ["--features", kind, "--workers", 1]
    assert run(whole.name, *words).status == 0
    original, calls = embedding.Embedder.__call__, []

    def stop(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Embedder, "__call__", stop)
        assert run(name, *words).status == 130
    ready = sorted(path.name for path in (tmp_path / f"{name}.parts").glob("*.npz"))
    assert ready == ["000000.npz", "000001.npz"] and not (tmp_path / name).exists()
    calls.clear()
    monkeypatch.setattr(
        embedding.Embedder, "__call__", lambda self, images: calls.append(len(images)) or original(self, images)
    )
    said = run(name, *words)
    assert said.status == 0 and "6 of them were ready from an earlier start" in said.out
    assert len(calls) == 3 and bytes_of(tmp_path / name) == bytes_of(whole)
    assert not (tmp_path / f"{name}.parts").exists()


def test_a_zarr_that_was_stopped_while_its_gaps_closed(run, tmp_path, monkeypatch):
    """Image 6 of 13 does not decode, so the chunks after it move up by one; the table cannot be written at first."""
    pytest.importorskip("zarr")
    words = ["--features", "patches", "--workers", 1]
    assert run("whole.zarr", *words).status == 0

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedding_files, "write_table", stop)
        assert run("out.zarr", *words).status == 130
    assert not (tmp_path / "out.zarr").exists()
    assert run("out.zarr", *words).status == 0
    found = bytes_of(tmp_path / "out.zarr")
    assert found == bytes_of(tmp_path / "whole.zarr") and "c.11.0.0.0" in found and "c.12.0.0.0" not in found


def test_parts_of_other_options_are_not_taken(run, tmp_path, monkeypatch):
    original, calls = embedding.Embedder.__call__, []

    def stop(self, images):
        calls.append(images)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Embedder, "__call__", stop)
        assert run("out.npz", "--workers", 1).status == 130
    assert run("out.npz", "--workers", 1, "--normalize", "false").status == 0
    assert run("other.npz", "--workers", 1, "--normalize", "false").status == 0
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


def refused(said, *parts):
    assert said.status == 2 and said.out == "" and said.err.splitlines()[-1].startswith("vit-suite: error: "), said
    for part in parts:
        assert part in said.err, said.err


def test_what_embed_refuses(run, vit_suite, tiny_run, folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    refused(run("out.txt"), "expected the ending .parquet, .npz, .npy or .csv, not '.txt'")
    refused(run("out.npz", "--features", "patches"), "patch tokens go into a folder")
    refused(run("out.npz", "--features", "clss"), "Did you mean 'cls'?")
    refused(run("images/000.jpg/out.npz"), "000.jpg' is a file")
    refused(run("out.npz", "--image_size", 33), "image_size 33x33 is not divisible by the patch size 8")
    refused(run("out.npz", images=tmp_path / "none"), "does not exist")
    refused(vit_suite("embed", "--checkpoint", tiny_run, "--output", tmp_path / "out.npz"), "no images to embed")
    (folder / "broken").mkdir()
    shutil.move(folder / "005b.jpg", folder / "broken" / "a.jpg")
    refused(run("out.npz", images=folder / "broken"), "none of the 1 images decodes", "a.jpg")
    shutil.move(folder / "broken" / "a.jpg", folder / "005b.jpg")
    (folder / "broken").rmdir()
    assert sorted(tmp_path.rglob("*")) == before
    assert run("out.npz").status == 0
    whole = (tmp_path / "out.npz").read_bytes()
    refused(run("out.npz"), "exists; name another, or give --overwrite")
    assert (tmp_path / "out.npz").read_bytes() == whole
    assert run("out.npz", "--overwrite").status == 0


def test_weights_that_have_diverged(run, monkeypatch, tmp_path):
    monkeypatch.setattr(embedding.Embedder, "_features", lambda self, views: torch.full((len(views), 4), torch.nan))
    refused(run("out.npz"), "features are not finite")
    assert not list(tmp_path.glob("out*"))


# neighbours
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(vit_suite, tiny_run, photographs, tmp_path):
    """Train (24 images, one of them twice) and test (12, one of them from train) of two classes."""
    root = tmp_path / "animals"
    shutil.copytree(photographs, root)
    shutil.copy(root / "train" / "dark" / "003.jpg", root / "train" / "dark" / "900.jpg")
    shutil.copy(root / "train" / "bright" / "004.jpg", root / "test" / "bright" / "901.jpg")
    for split in ("train", "test"):
        words = ["--data.name", "folder", "--data.root", root, "--data.test_split", split, "--precision", "fp32"]
        output = tmp_path / f"{split}.npz"
        assert vit_suite("embed", "--checkpoint", tiny_run, *words, "--output", output).status == 0
    return tmp_path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_nearest_duplicates_leak_and_clusters(vit_suite, embedded):
    words = ["--query", "dark/003.jpg", "--k", 4, "--duplicates", "--leak", embedded / "test.npz", "--clusters", 2]
    output = embedded / "said"
    said = vit_suite(
        "neighbours", "--embeddings", embedded / "train.npz", *words, "--cosine", 0.999999, "--output", output
    )
    assert said.status == 0, said.err
    found = read_embeddings(embedded / "train.npz")
    place = found.columns.paths.index(str(embedded / "animals/train/dark/003.jpg"))
    cosines = found.features.double() @ found.features[place].double()
    cosines[place] = -2
    near = rows(output / "neighbours.csv")
    assert [row["path"] for row in near] == [
        found.columns.paths[i] for i in cosines.argsort(descending=True, stable=True)[:4].tolist()
    ]
    assert near[0]["path"].endswith("dark/900.jpg") and float(near[0]["cosine"]) == pytest.approx(1, abs=1e-6)
    (pair,) = rows(output / "duplicates.csv")
    assert pair["first"].endswith("dark/003.jpg") and pair["second"].endswith("dark/900.jpg")
    (leaked,) = rows(output / "leak.csv")
    assert leaked["first"].endswith("train/bright/004.jpg") and leaked["second"].endswith("test/bright/901.jpg")
    clusters = rows(output / "clusters.csv")
    assert len(clusters) == 25 and {row["cluster"] for row in clusters} == {"0", "1"}
    (entry,) = json.loads((output / "results.json").read_text())
    metrics = entry["metrics"]
    assert metrics["duplicate_pairs"] == 1 and metrics["leaked_images"] == 1 and metrics["clusters"]["count"] == 2
    assert 1 <= metrics["rankme"] <= 24 and -4 <= metrics["uniformity"] < 0 < metrics["alignment_of_classes"] < 4
    assert entry["sha256"] == found.protocol["sha256"]
    for name in ("neighbours", "duplicates", "leak", "clusters"):
        assert (output / f"{name}.png").stat().st_size > 1000


def test_a_query_for_a_backbone_that_is_not_square(vit_suite, tmp_path):
    """The query is seen as the images of the file were: the image itself comes first, with cosine 1."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[16, 32]))
    save_backbone(backbone, tmp_path / "wide", [0.5] * 3, [0.25] * 3)
    save_pictures(tmp_path / "images", 8)
    words = ["--checkpoint", tmp_path / "wide"]
    images = ["--images", tmp_path / "images", "--precision", "fp32", "--output", tmp_path / "all.npz"]
    assert vit_suite("embed", *words, *images).status == 0
    picture = sorted((tmp_path / "images").iterdir())[3]
    (tmp_path / "outside").mkdir()
    query = shutil.copy(picture, tmp_path / "outside" / "query.jpg")
    words += ["--embeddings", tmp_path / "all.npz", "--query", query, "--output", tmp_path / "said"]
    said = vit_suite("neighbours", *words)
    assert said.status == 0, said.err
    (first, *_) = rows(tmp_path / "said" / "neighbours.csv")
    assert first["path"] == str(picture) and float(first["cosine"]) == pytest.approx(1, abs=1e-5)


def test_a_query_from_outside(vit_suite, tiny_run, embedded):
    """A copy of an image under another name finds that image."""
    copy = embedded / "copy.jpg"
    shutil.copy(embedded / "animals" / "train" / "bright" / "007.jpg", copy)
    words = ["--embeddings", embedded / "train.npz", "--query", copy, "--checkpoint", tiny_run, "--k", 2]
    assert vit_suite("neighbours", *words, "--output", embedded / "said").status == 0
    near = rows(embedded / "said" / "neighbours.csv")
    assert near[0]["path"].endswith("bright/007.jpg") and float(near[0]["cosine"]) == pytest.approx(1, abs=1e-5)


def test_what_neighbours_refuses(vit_suite, tiny_run, embedded, tmp_path):
    def neighbours(*words, file=embedded / "train.npz"):
        return vit_suite("neighbours", "--embeddings", file, "--output", tmp_path / "said", *words)

    picture(0, 20, 20).save(tmp_path / "new.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "new.png").read_bytes()[:60])
    (tmp_path / "cut.npz").write_bytes((embedded / "train.npz").read_bytes()[:500])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    before = sorted(tmp_path.rglob("*"))
    refused(neighbours(file=tmp_path / "none.npz"), "does not exist")
    refused(neighbours(file=tmp_path / "cut.npz"), "is truncated, or no file of `vit-suite embed`")
    refused(neighbours(file=tmp_path / "other.npz"), "is truncated, or no file of `vit-suite embed`")
    refused(neighbours(file=tmp_path / "new.png"), "is not one of .parquet, .npz, .npy, .csv")
    refused(neighbours("--query", "dark/9000.jpg"), "is no image of", "--checkpoint")
    refused(neighbours("--query", "000.jpg"), "fits 2 images")
    refused(neighbours("--query", tmp_path / "broken.png", "--checkpoint", tiny_run), "broken.png' does not decode")
    refused(neighbours("--clusters", 26), "clusters 26 is more than", "25")
    refused(neighbours("--output", tmp_path / "animals"), "is not empty")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_query_from_outside_is_read_as_the_set_was(vit_suite, tiny_run, tmp_path):
    """12-bit pictures in 16-bit files: read alone, a dark one would be taken for 8 bits and come out bright."""
    root = tmp_path / "twelve"
    root.mkdir()
    for number, most in enumerate((4000, 200)):
        picture = np.linspace(0, most, 32 * 32).reshape(32, 32).astype(np.uint16)
        Image.fromarray(picture).save(root / f"{number}.png")
    words = ["--checkpoint", tiny_run, "--precision", "fp32"]
    output = tmp_path / "set.npz"
    assert vit_suite("embed", *words, "--images", root, "--output", output).status == 0
    (tmp_path / "away").mkdir()
    dark = shutil.copy(root / "1.png", tmp_path / "away" / "dark.png")
    asked = ["--embeddings", output, "--query", dark, "--checkpoint", tiny_run, "--output", tmp_path / "said"]
    assert vit_suite("neighbours", *asked).status == 0
    near = rows(tmp_path / "said" / "neighbours.csv")
    assert near[0]["path"].endswith("1.png") and float(near[0]["cosine"]) == pytest.approx(1, abs=1e-5)


def test_too_many_files_that_do_not_decode(run, vit_suite, tiny_run, folder, tmp_path):
    """Under data.max_corrupt, for embed and attention: everything is written, and the status says it."""
    said = run("out.npz", "--data.max_corrupt", 0)
    assert said.status == 2 and "data.max_corrupt allows 0.0%" in said.err
    words = ["--checkpoint", tiny_run, "--images", folder, "--output", tmp_path / "maps", "--data.max_corrupt", 0]
    said = vit_suite("attention", *words)
    assert said.status == 2 and "005b.jpg" in said.err and (tmp_path / "maps" / "manifest.csv").is_file()
