"""profile: the parts of a step add up to it, every method is understood, and the trace names the parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import save_pictures, words
from vit_suite.training.phases import PARTS, Phases

METHODS = {
    "dino": {},
    "dinov2": {"method__name": "dinov2", "views__local_size": 16, "views__local_crops": 2},
    "mae": {"method__name": "mae", "method__decoder_dim": 16, "method__decoder_depth": 1, "method__decoder_heads": 2},
    "sit": {"method__name": "sit", "method__contrastive": "info_nce"},
    "supervised": {"method__name": "supervised", "method__ema": 0.99},
}
OWN = ("method__out_dim", "method__hidden_dim", "method__bottleneck_dim", "method__warmup_teacher_temperature_epochs",
       "views__local_size", "views__local_crops")  # fmt: skip
"""Options of the tiny run that only DINO has."""


@pytest.fixture
def profile(vit_suite, tmp_path):
    """`profile(name, ...)` profiles two steps of the tiny run of that method; what was printed, and the figures."""

    def call(name: str, **options) -> tuple[str, dict]:
        foreign = {} if name == "dino" else dict.fromkeys(OWN)
        given = words(**{"run__output": tmp_path / "run", **foreign, **METHODS[name], **options})
        said = vit_suite("profile", *given, "--steps", 2, "--warmup", 1, "--output", tmp_path / "out")
        assert said.status == 0, said.err
        return said.out, json.loads((tmp_path / "out" / "profile.json").read_text())

    return call


@pytest.mark.parametrize("name", METHODS)
def test_parts_and_trace(profile, tmp_path, name):
    out, figures = profile(name)
    # 4 steps an epoch and 2 epochs: the 7 steps cross an epoch
    expected = set(PARTS) - ({"teacher forward"} if name in ("mae", "supervised") else set())
    assert set(figures["parts"]) == expected
    assert figures["parts"]["backward"] > figures["parts"]["clip"]
    assert 0.2 < sum(figures["parts"].values()) / figures["seconds"] < 5  # two passes, on a machine that others use too
    assert figures["images_per_second"] == pytest.approx(16 / figures["seconds"])
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert spans.count("backward") == 2 and expected <= set(spans)
    for shown in (*expected, "images/s", "GFLOP/s", "peak memory", "aten::"):
        assert shown in out
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.json", "trace.json"]


def test_backward_passes_within_the_loss(profile):
    """Of a student that learns from some crops at a time."""
    parts = profile("dino", method__crops_at_once=1)[1]["parts"]
    assert parts["backward"] > parts["loss"]


def test_products_are_counted(profile):
    """A bigger network in the same place: the count follows the blocks; accumulation does not change it, nor do views
    count."""
    flops = profile("supervised")[1]["flops"]
    deeper = profile("supervised", backbone__depth=4)[1]["flops"]
    tokens, dim, batch = 17, 24, 16
    forward = (
        2 * tokens * 12 * dim * dim + 4 * tokens * tokens * dim
    )  # of one block and image: products with weights, attention
    assert deeper - flops == pytest.approx(
        2 * 3 * batch * forward, rel=1e-6
    )  # two blocks; backward is twice the forward
    assert profile("supervised", trainer__accumulate=2)[1]["flops"] == pytest.approx(flops, rel=1e-6)


def test_parts_of_files(profile, tmp_path):
    """Decoding is the part that data takes."""
    save_pictures(tmp_path / "photos" / "train" / "a", 16)
    save_pictures(tmp_path / "photos" / "train" / "b", 16, seed=50)
    files = {"data__name": "folder", "data__root": tmp_path / "photos", "data__workers": 0, "data__resident": False}
    unused = dict.fromkeys(("data__length", "data__test_length", "data__image_size"))
    _, figures = profile("dino", **files, **unused, evaluate__every_epochs=0)
    assert figures["parts"]["data"] > 3 * figures["parts"]["clip"]


def test_phases_charge_the_innermost(monkeypatch):
    """1 s outside, 2 s in the loss, 4 s in a network within it: each has its own, and all make 7 s."""
    clock = iter([0.0, 1.0, 2.0, 6.0, 7.0, 7.0])
    monkeypatch.setattr("vit_suite.training.phases.now", lambda device: next(clock))
    phases = Phases(torch.device("cpu"))
    phases.start()
    with phases.part("loss"), phases.part("student forward"):
        pass
    phases.stop()
    found = {name: seconds for name, seconds in phases.seconds.items() if seconds}
    assert found == {"other": 1.0, "loss": 2.0, "student forward": 4.0}


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({}, ["--steps", "0"], "--steps: expected int (at least 1), got '0'"),
        ({}, ["--stepps", "3"], "unknown option '--stepps'. Did you mean '--steps'?"),
        ({"trainer__devices": 2}, [], "profile looks at one process: leave trainer.devices"),
        ({"trainer__strategy": "fsdp2"}, [], "trainer.strategy fsdp2 spreads the weights over ranks"),
        ({}, ["--drill", "kill@2"], "drill interrupts a training"),
        ({"data__batch_size": 65}, [], "data.batch_size 65 is larger than the data set of 64 training images"),
        ({}, ["--output", "file"], "output 'file' is a file; expected a directory"),
    ],
)
def test_wrong_input(vit_suite, tmp_path, monkeypatch, options, extra, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("here already")
    said = vit_suite("profile", *words(run__output="run", **options), *extra)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
