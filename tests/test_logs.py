"""Which process speaks and writes for all, by what each kind of launcher sets."""

from __future__ import annotations

import pytest

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
