"""The benches run, at sizes of seconds, and say what they promise: who was measured, and ratios that follow from the
figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
MICRO = {"dim": 24, "depth": 2, "heads": 3, "patch": 4, "sizes": (16, 8), "local": 2, "batch": 4, "prototypes": 64}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Modules of scripts/ can be imported, and the number of threads is left alone."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def figures(monkeypatch, tmp_path, capsys):
    """Runs the `main` of a bench with these words; what it wrote as JSON."""

    def run(module, *words: str) -> dict:
        output = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [module.__file__, *words, "--output", str(output)])
        module.main()
        assert capsys.readouterr().out
        return json.loads(output.read_text())

    return run


def test_contenders_take_turns_after_a_round_that_warms_up():
    from bench_common import in_turn

    calls, clock = [], [0.0]

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    times = in_turn({"a": lambda: call("a", 2.0), "b": lambda: call("b", 4.0)}, rounds=2, cpu=lambda: clock[0])
    assert calls == ["a", "b"] * 3
    assert times["a"].cpu == [2.0, 2.0] and times["b"].cpu == [4.0, 4.0]


def test_rows_and_ratios():
    from bench_common import Times, add_ratios

    rows = [Times([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]).row(8, "images"), Times([4.0], [8.0]).row(8, "images")]
    assert rows[0] == {"images/s": 4.0, "spread": 1.5, "images/CPU-s": 8.0}
    add_ratios(rows, "images")
    assert (rows[0]["ratio"], rows[0]["CPU ratio"], rows[1]["ratio"]) == (2.0, 8.0, 1.0)


def test_step(figures, monkeypatch):
    import bench_step

    monkeypatch.setattr(bench_step, "CASES", {"tiny": MICRO})
    monkeypatch.setattr(bench_step, "peak_memory", lambda *_: 1.0)
    monkeypatch.setattr(bench_step, "pick_precision", lambda *_: "bf16")
    monkeypatch.setattr(bench_step, "matmul_rate", lambda *_: 1e9)
    rows = figures(bench_step, "--case", "tiny", "--rounds", "1", "--lean")["rows"]
    assert [row["contender"] for row in rows] == [
        *(f"ours bf16 {name}" for name in bench_step.LEAN),
        "ours bf16",
        "ours fp32",
    ]
    work = {row["contender"]: row["GFLOP an image"] for row in rows}
    assert work["ours bf16"] == work["ours fp32"] < work["ours bf16 checkpointing"]  # which goes forward twice
    assert rows[-1]["ratio"] == rows[-1]["CPU ratio"] == 1.0


def test_the_contenders_of_a_step_do_the_same():
    import bench_step

    losses = {lean: float(bench_step.ours(MICRO, "fp32", lean)()) for lean in (None, *bench_step.LEAN)}
    assert list(losses.values()) == pytest.approx([losses[None]] * 4, abs=1e-5)


def test_memory_that_a_call_adds():
    from bench_common import added

    torch.ones(80 * 2**18)  # 80 MiB that were there before
    assert added(lambda: None) < 5
    assert added(lambda: torch.ones(50 * 2**18)) == pytest.approx(50, abs=5)


def test_memory_of_a_step(monkeypatch, capsys):
    """With the network and its optimizer: of 4.8 million parameters 16 bytes each for the student, 4 for the teacher:
    91 MiB at least."""
    import bench_step

    monkeypatch.setattr(bench_step, "CASES", {"tiny": MICRO})
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--case", "tiny", "--only", "ours fp32"])
    bench_step.main()
    assert float(capsys.readouterr().out) > 90


def test_knn(figures, monkeypatch):
    import bench_knn

    monkeypatch.setattr(bench_knn, "peak_memory", lambda *_: 1.0)
    rows = figures(bench_knn, "--bank", "600", "--queries", "40", "--dim", "32", "--rounds", "1")["rows"]
    assert {row["contender"] for row in rows} >= {"ours fp32", "plain"}
    assert len({row["top-1"] for row in rows}) == 1 and 1 < rows[0]["top-1"] < 100


def test_views(figures, monkeypatch):
    import bench_views

    from vit_suite.config import ViewsConfig

    monkeypatch.setattr(
        bench_views,
        "CASES",
        {"small": ("title", (16, 16), 4, ViewsConfig(global_size=16, local_size=8, local_crops=1))},
    )
    found = figures(bench_views, "--rounds", "1")["cases"][0]
    assert found["ratio_to_pil"]["PIL, image by image"] == 1.0 and len(found["images_per_second"]) == 4


def test_loader(figures):
    import bench_loader

    rows = figures(
        bench_loader, "--images", "8", "--size", "24", "32", "--batch", "4", "--workers", "0", "--rounds", "1"
    )["rows"]
    assert [row["contender"] for row in rows] == ["files", "shards", "memory", "torchvision"]


def test_start(figures):
    import bench_start

    row = figures(bench_start, "--case", "vit-suite --help", "--rounds", "1")["rows"][0]
    assert row["ratio"] == pytest.approx(row["CPU ms"] / row["against, CPU ms"])
    with pytest.raises(SystemExit, match="ended with 3"):
        bench_start.cost([sys.executable, "-c", "raise SystemExit(3)"])


def test_growth(figures, monkeypatch, tmp_path):
    import bench_scaling

    monkeypatch.setattr(
        bench_scaling, "AXES", {"batch": (1.0, [2, 4], lambda n: MICRO | {"batch": n}), "bank": (1.0, [300, 600], None)}
    )
    rows = figures(bench_scaling, "--axis", "batch", "bank", "--rounds", "1", "--plot", str(tmp_path / "plot.png"))[
        "rows"
    ]
    assert [list(row["CPU ms"]) for row in rows] == [["2", "4"], ["300", "600"]]
    assert Image.open(tmp_path / "plot.png").width == 2 * bench_scaling.SIDE


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_of_a_power(power):
    from bench_scaling import slope

    assert slope([2, 4, 16], [3 * n**power for n in (2, 4, 16)]) == pytest.approx(power)


@pytest.mark.parametrize("method", ["dino", "dinov2", "mae"])
def test_steps_of_lightly_learn(method):
    """Each contender of scripts/bench_step.py takes real steps: its loss on the same crops falls."""
    pytest.importorskip("lightly")
    import bench_step

    case = MICRO | {"method": method, "sizes": (32, 16)}  # lightly masks no grid below 40 patches
    if method == "mae":
        del case["local"]
    step = bench_step.lightly(case, "fp32", bench_step.CPU)
    losses = [float(step()) for _ in range(12)]
    assert losses[-1] < losses[0] and losses[-1] > 0
