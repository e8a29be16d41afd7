"""Threads sleep at once beside other jobs, spin on free cores, and the user's own choice stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vit_suite import environment


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(load, running)`: four cores with that load average and so many processes ready to run."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)

    def make(load, running):
        (tmp_path / "loadavg").write_text(f"{load} 1.0 1.0 {running}/500 1234\n")
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 1.0, 1.0), raising=False)
        monkeypatch.setattr(environment, "Path", lambda _: tmp_path / "loadavg")

    return make


@pytest.mark.parametrize(
    ("load", "running", "passive"), [(0.3, 1, False), (1.9, 2, False), (2.0, 1, True), (0.1, 3, True)]
)
def test_passive_beside_other_jobs(machine, monkeypatch, load, running, passive):
    machine(load, running)
    environment.choose_waiting()
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if passive else None)
    assert os.environ.get("GOMP_SPINCOUNT") == (None if passive else "100000")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_own_choice_stays(machine, monkeypatch, name):
    machine(9.0, 9)
    monkeypatch.setenv(name, "active" if name == "OMP_WAIT_POLICY" else "7")
    before = dict(os.environ)
    environment.choose_waiting()
    assert dict(os.environ) == before


def test_it_is_chosen_before_torch_is_imported():
    code = (
        "import sys; from vit_suite import environment\n"
        "environment.choose_waiting = lambda: print('torch' in sys.modules)\n"
        "from vit_suite import cli; cli.main(['doctor', '--print_config'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.startswith("False\n"), said.stderr
