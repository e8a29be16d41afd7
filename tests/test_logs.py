"""Which process speaks and writes for all, by what each kind of launcher sets; how progress looks in a file."""

from __future__ import annotations

import time

import pytest

from vit_suite import logs
from vit_suite.logs import main_process


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # started by Lightning on this machine
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),  # started by hand on each machine
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun numbers nodes in its own order
        ({"RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),  # srun
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning, from a shell on a SLURM node
    ],
)
def test_main_process(monkeypatch, environment, expected):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main_process() is expected


def test_progress_in_a_file_is_a_line_now_and_then(capsys, monkeypatch):
    """No carriage returns, and nothing of a job that is done at once."""
    with logs.progress_bar(3, "quick", "image") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.05)
    with logs.progress_bar(20, "slow", "image", leave=True) as bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said and 2 <= len(said.splitlines()) <= 8
    assert all(line.startswith("slow: ") and line.endswith("image/s]") for line in said.splitlines()), said
