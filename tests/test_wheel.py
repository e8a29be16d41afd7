"""A wheel of the tree, installed into an environment of its own outside the checkout, does what the README shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.documented import ROOT, documented
from tests.test_doc_commands import made_small, small_files

COPIED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
DEMO = "demo --images 256 --test_images 64 --epochs 1 --progress false"
LARGEST = 3 * 2**20
"""Bytes: a wheel above that carries something that does not belong in it."""
RUN_ALL = """
import json, sys
import vit_suite
from vit_suite import cli
print(vit_suite.__file__)
answers = []
for words in json.loads(sys.argv[1]):
    print("$ vit-suite", *words, flush=True)
    answers.append(cli.main(words))
print(json.dumps(answers))
"""
"""All commands in one process: importing torch a dozen times would take longer than they do."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    copy.mkdir()
    for name in ("vit_suite", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED:
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, folder], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of an environment that has the wheel; its dependencies are those of this environment, without the
    checkout."""
    environment = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    program = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", program, "install", "-q", "--no-deps", "--no-index", wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    packages = next((environment / "lib").glob("python*/site-packages"))
    # A folder that a .pth file names is on the path, but its own .pth files (an editable install) are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return program


@pytest.mark.slow
def test_it_carries_the_recipes_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"vit_suite/{name}" for name in recipes} <= names
    assert {"vit_suite/py.typed", "vit_suite/weights/builtin/shapes.safetensors"} <= names
    assert {name.partition("/")[0].split("-")[0] for name in names} == {"vit_suite"}
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_the_readme_works_outside_the_checkout(python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    small_files(tmp_path)
    made: set[str] = set()
    commands = [made_small(shown.line, made) for shown in documented() if shown.page == "README.md"]
    for words in commands:
        words += ["--dry-run"] if words[0] == "launch" and "--status" not in words else []
    commands = [["--version"], DEMO.split(), *commands]
    done = subprocess.run([python, "-c", RUN_ALL, json.dumps(commands)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *_, last = done.stdout.splitlines()
    assert Path(first).is_relative_to(python.parents[1])
    failed = [words for words, status in zip(commands, json.loads(last), strict=True) if status]
    assert not failed, done.stderr[-3000:]
    assert len(commands) > 12 and (tmp_path / "demo" / "overview.png").is_file()
    script = subprocess.run([python.with_name("vit-suite"), "--help"], capture_output=True, text=True)
    assert script.returncode == 0 and "usage: vit-suite COMMAND" in script.stdout
