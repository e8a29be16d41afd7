"""The command line: methods, exit status, messages, help, and what is imported. Options are in test_parsing.py."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

import vit_suite
from vit_suite import cli
from vit_suite.config import DINOConfig, Range, RunOptions
from vit_suite.errors import UserError
from vit_suite.options import Schema, attribute_docs

from .test_parsing import write

# Stand-ins for a command and its options; the table of commands refers to them by name, as it does to the real ones.
# ---------------


@dataclass
class Fast:
    """Quick method."""

    name: Literal["fast"] = "fast"
    """Which."""
    speed: Annotated[float, Range(above=0)] = 1.0
    """In m/s."""


@dataclass
class Slow:
    """Slow method."""

    name: Literal["slow"] = "slow"
    """Which."""
    patience: int = 3
    """In days."""


@dataclass
class FakeConfig:
    """A pretended command."""

    method: Any = field(default_factory=lambda: Fast(speed=2.0), metadata={"variants": {"fast": Fast, "slow": Slow}})
    run: RunOptions = field(default_factory=lambda: RunOptions(name="fake", output="out"))
    fail: str = ""
    """What to raise."""


seen: list[FakeConfig] = []


class OutOfMemoryError(RuntimeError):
    """Named as torch.cuda's."""


def fake(config: FakeConfig) -> None:
    seen.append(config)
    if config.fail == "lightning":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    errors = {
        "user": UserError("data.root: no such folder\n  'x'"),
        "worker": UserError(
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File 'x', line 1\nvit_suite.errors.UserError: 12 of 20 files do not decode: see quarantine.txt"
        ),
        "bug": ZeroDivisionError("division by zero"),
        "silent": AssertionError(),
        "memory": OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "interrupt": KeyboardInterrupt(),
    }
    if config.fail:
        raise errors[config.fail]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("--a", "b") -> (status, stdout, stderr, config that the command got), in an empty working directory."""
    command = cli.Command("Pretend", f"{__name__}:FakeConfig", f"{__name__}:fake")
    monkeypatch.setitem(cli.COMMANDS, "fake", command)
    monkeypatch.chdir(tmp_path)
    seen.clear()

    def call(*words, command="fake"):
        status = cli.main([command, *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, seen[-1] if seen else None

    return call


# Methods
# ----------------------------------------------------------------------------------------------------------------------


def test_method_name_chooses_its_options(run, tmp_path):
    assert run()[3].method == Fast(speed=2.0)  # the default of the command, not of the class
    assert run("--method.name", "slow", "--method.patience", "5")[3].method == Slow(patience=5)
    file = write(tmp_path / "m.yaml", "method: {name: slow}")
    assert run("--config", file)[3].method == Slow()
    assert run("--config", file, "--method.name", "fast")[3].method == Fast(speed=2.0)
    status, _, err, _ = run("--config", file, "--method.speed", "3")
    assert status == 2 and "unknown option '--method.speed'" in err
    status, _, err, _ = run("--method.queue", "3", "--method.name", "sloww")
    assert err == "vit-suite: error: --method.name: expected one of fast, slow, got 'sloww'. Did you mean 'slow'?\n"


def test_help_shows_the_chosen_method(run):
    assert "--method.speed" in run("--help")[1]
    out = run("--method.name", "slow", "--help")[1]
    assert "--method.patience" in out and "--method.speed" not in out and "one of fast, slow" in out


# Exit status and messages
# -----------------------------------------------------------------------------------------------------------


def test_success_passes_the_config(run, capsys):
    status, out, err, config = run("--run.seed", "7")
    assert (status, out, err, config.run.seed, config.run.name) == (0, "", "", 7, "fake")


def test_users_mistake_is_one_line_and_status_2(run):
    assert run("--fail", "user")[:3] == (2, "", "vit-suite: error: data.root: no such folder 'x'\n")
    assert run("--fail", "worker")[:3] == (
        2,
        "",
        "vit-suite: error: 12 of 20 files do not decode: see quarantine.txt\n",
    )


def test_fault_is_one_line_status_1_and_a_log(run, tmp_path):
    status, out, err, _ = run("--fail", "bug")
    assert (status, out) == (1, "")
    assert err == "vit-suite: error: ZeroDivisionError: division by zero (traceback: vit-suite-error.log)\n"
    (tmp_path / "out").mkdir()
    assert "(traceback: out/vit-suite-error.log)" in run("--fail", "bug")[2]
    run("--fail", "silent")
    log = (tmp_path / "out" / "vit-suite-error.log").read_text()
    assert "vit-suite fake --fail bug" in log and "Traceback" in log and "raise errors[config.fail]" in log
    assert "vit-suite fake --fail silent" in log  # appended, not replaced


def test_log_goes_elsewhere_when_the_folder_cannot_be_written(run, monkeypatch, tmp_path):
    (tmp_path / "vit-suite-error.log").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    assert f"(traceback: {tmp_path}/temp/vit-suite-error.log)" in run("--fail", "bug")[2]


def test_out_of_memory_gets_advice(run):
    status, _, err, _ = run("--fail", "memory")
    assert status == 1 and err.count("\n") == 1 and "CUDA out of memory" in err and "trainer.accumulate" in err


def test_interruption_is_status_130(run):
    assert run("--fail", "interrupt")[:3] == (130, "", "vit-suite: interrupted\n")
    assert run("--fail", "lightning")[:3] == (130, "", "vit-suite: interrupted\n")


def test_unknown_command(run):
    known = ", ".join(cli.COMMANDS)
    message = f"vit-suite: error: unknown command 'pretrian'. Did you mean 'pretrain'? Known: {known}.\n"
    assert run(command="pretrian")[:3] == (2, "", message) and known.endswith(", fake")
    assert run(command="--config")[0] == 2


def test_print_config_runs_nothing_and_reads_back(run, tmp_path):
    status, out, err, config = run("--run.seed", "7", "--print_config", "--method.name", "slow")
    assert (status, err, config) == (0, "", None)
    assert yaml.safe_load(out)["run"]["seed"] == 7
    run("--config", write(tmp_path / "c.yaml", out))
    assert seen[-1].method == Slow() and seen[-1].run.seed == 7


# Help
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "pretrain", "knn", "attention"])
def test_every_option_is_explained_with_type_and_default(run, name):
    config_class = cli._load(cli.COMMANDS[name].config)
    status, out, err, _ = run("--help", command=name)
    assert status == 0 and not err
    schema = Schema(config_class)
    for group, cls in schema.groups.items():
        docs = attribute_docs(cls)
        for key in schema.options:
            if key.rpartition(".")[0] == group:
                assert docs.get(key.rpartition(".")[2]), f"{key} has no docstring"
                assert f"--{key}" in out.split()
    facts = re.findall(r"(default [^]]*|optional|required)\]", " ".join(out.split()))
    assert len(facts) == len(schema.options)


def test_help_of_an_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # as wide as it gets
    out = run("--help", command="pretrain")[1]
    line = next(line for line in out.splitlines() if line.startswith("  --optim.clip "))
    text = "Largest L2 norm of a gradient; 0 turns clipping off. [float (at least 0), default 3.0]"
    assert line == f"  --optim.clip                  {text}"
    assert "optim: AdamW with linear warm-up" in out
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run("--help", command="pretrain")[1].splitlines())) <= 80


def test_attribute_docs_include_the_base_class():
    @dataclass
    class Child(DINOConfig):
        extra: int = 1

    assert attribute_docs(Child)["out_dim"].startswith("Prototypes K")


# As a process
# ----------------------------------------------------------------------------------------------------------------------


def process(*words, **kwargs):
    command = [sys.executable, "-X", "importtime", "-m", "vit_suite", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def imported(stderr: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    "words, absent",
    [
        ([], {"torch", "numpy", "yaml", "dataclasses", "vit_suite.config"}),
        (["--help"], {"torch", "numpy", "yaml", "dataclasses", "vit_suite.config"}),
        (["--version"], {"torch", "numpy", "yaml", "dataclasses", "vit_suite.config"}),
        (["pretrain", "--help"], {"torch", "numpy", "yaml", "pytorch_lightning", "timm"}),
        (["pretrain", "--print_config", "--optim.lr", "1e-3"], {"torch", "numpy", "pytorch_lightning", "timm"}),
    ],
)
def test_nothing_heavy_is_imported(words, absent):
    done = process(*words)
    assert done.returncode == 0 and done.stdout
    modules = imported(done.stderr)
    assert "vit_suite.cli" in modules
    assert not modules & absent


def test_wrong_key_answers_without_torch():
    done = process("pretrain", "--optim.lrr", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert "torch" not in imported(done.stderr)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["vit-suite: error: unknown option '--optim.lrr'. Did you mean '--optim.lr'?"]


def test_version_is_the_package_s():
    assert process("--version").stdout == f"vit-suite {vit_suite.__version__}\n"


def test_closed_pipe_is_silent():
    command = f"{sys.executable} -m vit_suite pretrain --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("usage: vit-suite pretrain")


ENDING = """
import atexit, sys
from vit_suite import cli

class Kept:
    def __del__(self):
        print("collected")

def main():
    atexit.register(print, "handler")
    return 3

kept = Kept()
kept.itself = kept
cli.main = main
sys.exit(cli.program())
"""


def test_a_process_ends_after_its_handlers_and_before_the_last_collection():
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    options = {"text": True, "timeout": 60, "env": buffered}
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (3, "handler\n", "")
    with open("/dev/full", "w") as full:  # what was printed is lost, so the process must not end as if it were not
        done = subprocess.run([sys.executable, "-c", ENDING], stdout=full, stderr=subprocess.PIPE, **options)
    assert done.returncode not in (0, 3) and "No space left" in done.stderr


SLEEPER = """
import sys, time
from dataclasses import dataclass
from vit_suite import cli

@dataclass
class Config:
    n: int = 1

def run(config):
    print("ready", flush=True)
    time.sleep(30)

if __name__ == "__main__":
    cli.COMMANDS["sleep"] = cli.Command("", "sleeper:Config", "sleeper:run")
    sys.exit(cli.main())
"""


def test_ctrl_c_on_a_process(tmp_path):
    write(tmp_path / "sleeper.py", SLEEPER)
    root = os.path.dirname(os.path.dirname(cli.__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "sleeper.py", "sleep"], cwd=tmp_path, env=environment, text=True, **pipes)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "vit-suite: interrupted\n")


SCRIPT = Path(sys.executable).with_name("vit-suite")


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
def test_console_script():
    assert subprocess.run([SCRIPT, "knn"], capture_output=True, text=True, timeout=60).returncode == 2
