"""bench_gpu.py, whole, on a CPU: every case runs, a contender that cannot is reported, and the figures agree with each
other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import bench_gpu  # noqa: E402

STEPS = ["step vits16", "step vitb16", "step dinov2 vits16", "step mae vits16"]
TRAININGS = ["training cifar", "training sit vits16", "training supervised vits16"]


@pytest.mark.slow
def test_every_case_on_a_cpu(tmp_path):
    size = ("--device", "cpu", "--tiny", "--rounds", 2, "--steps", 1)
    contenders = ("--contender", "ours", "ours graphs", "lightly bf16", "official fp16")
    command = [sys.executable, str(SCRIPT), *map(str, size), *contenders, "--output", str(tmp_path / "gpu.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = [row for row in found["rows"] if row["contender"] == "ours"]
    ran = [(row["case"], row["batch"]) for row in rows]
    assert ran == [(case, batch) for case in STEPS for batch in (2, 4)] + [
        (case, 16 if "supervised" in case else 4) for case in TRAININGS
    ]
    assert all(row["host ms"] > 0 and row["step ms"] > 0 for row in rows if row["case"] in STEPS)
    for row in rows:
        assert row["images/s"] > 0 and row["GFLOP an image"] > 0 and row["peak MiB"] > 0 and row["case"] in done.stdout
        assert row["TFLOP/s"] == pytest.approx(row["images/s"] * row["GFLOP an image"] / 1e3)
        assert row["of matmul rate"] == pytest.approx(
            row["TFLOP/s"] / found["matmul_teraflops"], rel=0.5
        )  # which is rounded
    assert (
        found["rows"][-1]["ratio"] == 1
        and found["tiny"] is True
        and found["torch"].startswith(found["versions"]["torch"])
    )
    refused = {
        key: reason for key, reason in found["failed"].items() if "lightly" not in key
    }  # another package, there or not
    assert list(refused) == [f"{case}: ours graphs" for case in STEPS + TRAININGS]
    assert all("captures CUDA graphs, and this training is on a CPU" in reason for reason in refused.values())
    assert (
        found["versions"]["lightly"] != "not installed"
        or "No module named 'lightly'" in found["failed"]["step vits16: lightly bf16"]
    )


def test_the_plan_fits_nine_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--plan", "--peer", str(tmp_path)])
    bench_gpu.main()
    said = capsys.readouterr().out
    minutes = float(said.split("together ")[1].split()[0])
    assert 3 < minutes < 9 and all(case in said for case in STEPS + TRAININGS)
    assert "official fp16" in said and "ours graphs" not in said


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^bench_gpu.py: torch sees no GPU here; --device cpu --tiny shows on a CPU"):
        bench_gpu.main()
    assert not capsys.readouterr().out
