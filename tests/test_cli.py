"""The command line and the configuration: precedence, every kind of mistake, exit status, help, and what is imported."""

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
from vit_suite.config import AttentionConfig, DemoConfig, DINOConfig, KNNConfig, PretrainConfig, Range, RunOptions
from vit_suite.errors import UserError
from vit_suite.options import SYNONYMS, Schema, attribute_docs
from vit_suite.parsing import dump_config, load_config

# Stand-ins for a command and its options; the table of commands refers to them by name, as it does to the real ones. ---------------


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
        "worker": UserError("Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                            "  File 'x', line 1\nvit_suite.errors.UserError: 12 of 20 files do not decode: see quarantine.txt"),
        "bug": ZeroDivisionError("division by zero"),
        "silent": AssertionError(),
        "memory": OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "interrupt": KeyboardInterrupt(),
    }  # fmt: skip
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


def write(path, text):
    path.write_text(text)
    return path


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Precedence and values --------------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_file_over_default(tmp_path):
    file = write(tmp_path / "a.yaml", "optim: {lr: 1e-3, clip: 0}\nviews:\n  local_crops: 4\n")
    for words in (["--config", file, "--optim.lr", "2e-3"], ["--optim.lr", "2e-3", "--config", file]):
        config = load_config(None, [str(word) for word in words])
        assert (config.optim.lr, config.optim.clip, config.views.local_crops) == (2e-3, 0.0, 4)
        assert config.optim.min_lr == PretrainConfig().optim.min_lr
    assert load_config(file).optim.lr == 1e-3
    assert load_config().optim.lr == PretrainConfig().optim.lr


def test_later_file_wins_over_earlier(tmp_path):
    first, second = write(tmp_path / "1.yaml", "optim: {lr: 1, clip: 1}"), write(tmp_path / "2.yaml", "optim: {lr: 2}")
    for words in (["--config", first, "--config", second], ["--config", first, second]):
        config = load_config(None, [str(word) for word in words])
        assert (config.optim.lr, config.optim.clip) == (2.0, 1.0)


@pytest.mark.parametrize(
    "words, key, value",
    [
        ("--optim.lr 1e-3", "optim.lr", 1e-3),
        ("--optim.lr=5E-4", "optim.lr", 5e-4),
        ("--optim.lr 1", "optim.lr", 1.0),
        ("--optim.lr 1 --optim.lr 2", "optim.lr", 2.0),
        ("--trainer.max_steps -1", "trainer.max_steps", -1),
        ("--views.local-crops 3", "views.local_crops", 3),
        ("--run.overwrite", "run.overwrite", True),
        ("--run.overwrite true", "run.overwrite", True),
        ("--run.overwrite --optim.lr 1", "run.overwrite", True),
        ("--run.overwrite no", "run.overwrite", False),
        ("--data.resident", "data.resident", True),
        ("--data.resident auto", "data.resident", "auto"),
        ("--data.workers 3", "data.workers", 3),
        ("--data.workers auto", "data.workers", "auto"),
        ("--views.global_scale 0.4 1.0", "views.global_scale", [0.4, 1.0]),
        ("--views.global_scale [0.4,1]", "views.global_scale", [0.4, 1.0]),
        ("--data.mean 0.5", "data.mean", [0.5]),
        ("--data.mean null", "data.mean", None),
        ("--backbone.image_size 32 48", "backbone.image_size", [32, 48]),
        ("--data.root 2024", "data.root", "2024"),
        ("--data.root=a=b", "data.root", "a=b"),
        ("--run.name no", "run.name", "no"),
        ("--run.name null", "run.name", "null"),
        ("--data.root null", "data.root", None),
    ],
)
def test_value_on_the_command_line(words, key, value):
    group, name = key.split(".")
    got = getattr(getattr(load_config(None, words.split()), group), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("optim: {lr: 1e-3}", "optim.lr", 1e-3),
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("optim.lr: 1e-3", "optim.lr", 1e-3),
        ("run: {name: 2024}", "run.name", "2024"),
        ("run: {name: no}", "run.name", "no"),
        ("run: {overwrite: yes}", "run.overwrite", True),
        ("data: {root: }", "data.root", None),
        ("data: {root: ~}", "data.root", None),
        ("data: {workers: auto}", "data.workers", "auto"),
        ("views:\n  global_scale:\n  - 4e-1\n  - 1\n", "views.global_scale", [0.4, 1.0]),
        ("a: &a [0.1, 0.2]".replace("a: ", "views: {global_scale: ") + ", local_scale: *a}", "views.local_scale", [0.1, 0.2]),
    ],
)
def test_value_in_a_file(tmp_path, text, key, value):
    group, name = key.split(".")
    got = getattr(getattr(load_config(write(tmp_path / "x.yaml", text)), group), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["", "\n# only a remark\n", "optim:\n  # lr: 1\n", "{}", "null", "optim: {}"])
def test_empty_file_means_defaults(tmp_path, text):
    assert load_config(write(tmp_path / "x.yaml", text)) == PretrainConfig()


def test_overrides_from_python(tmp_path):
    config = load_config(None, {"optim": {"lr": 1e-3, "betas": (0.8, 0.9)}, "run.output": tmp_path, "data.root": None})
    assert (config.optim.lr, config.optim.betas, config.run.output) == (1e-3, [0.8, 0.9], str(tmp_path))
    assert error_of(load_config, None, {"optim": {"lrr": 1}}) == "unknown key 'optim.lrr'. Did you mean 'optim.lr'?"
    assert error_of(load_config, None, {"optim.lr": "fast"}) == "optim.lr: expected float (at least 0), got 'fast'"


def test_defaults_are_not_shared_between_configs():
    first = load_config()
    first.views.global_scale.append(9.0)
    assert load_config().views.global_scale == PretrainConfig().views.global_scale == [0.4, 1.0]


@pytest.mark.parametrize("config", [PretrainConfig(), KNNConfig("c"), AttentionConfig("c", "i"), DemoConfig()])
def test_dump_reads_back(tmp_path, config):
    assert load_config(write(tmp_path / "c.yaml", dump_config(config)), cls=type(config)) == config


@pytest.mark.parametrize("text", ["", "a b", "1", "1e-3", "no", "null", "[a]", "{a: b}", "a: b", "# x", "ü", "'q'", "-", "a\nb", "*"])
def test_dump_keeps_odd_text_and_numbers(tmp_path, text):
    config = PretrainConfig()
    config.run.name, config.optim.lr, config.optim.clip = text, 1 / 3 * 1e-9, 1e22
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config


# Mistakes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim:\n  learning_rate: 1", ":2: unknown key 'optim.learning_rate'. Did you mean 'optim.lr'?"),
        ("optim:\n  clip: 1\n  lrr: 1", ":3: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("optimizer:\n  lr: 1", ":2: unknown key 'optimizer.lr'. Did you mean 'optim.lr'?"),
        ("epochs: 3", ":1: unknown key 'epochs'. Did you mean 'trainer.max_epochs'?"),
        ("batch_size: 3", ":1: unknown key 'batch_size'. Did you mean 'data.batch_size'?"),
        ("trainer: {lr: 3}", ":1: unknown key 'trainer.lr'. Did you mean 'optim.lr'?"),
        ("optim: {lr: {peak: 1}}", ":1: unknown key 'optim.lr.peak'"),
        ("optim:\n  lr: fast", ":2: optim.lr: expected float (at least 0), got 'fast'"),
        ("optim:\n  lr:", ":2: optim.lr: expected float (at least 0), got nothing"),
        ("optim:\n  lr: [1]", ":2: optim.lr: expected float (at least 0), got ['1']"),
        ("optim: {lr: .nan}", ":1: optim.lr: expected float (at least 0), got '.nan'"),
        ("optim: {lr: .inf}", ":1: optim.lr: expected float (at least 0), got '.inf'"),
        ("optim: {betas: 0.9}", ":1: optim.betas: expected list of float (2 of them, 0 to 1), got '0.9'"),
        ("optim: {betas: [0.9, x]}", ":1: optim.betas: expected list of float (2 of them, 0 to 1), got 'x'"),
        ("optim: {betas: [0.9, {a: 1}]}", ":1: optim.betas: expected list of float (2 of them, 0 to 1), got {}"),
        ("optim: 3", ":1: optim: is a group of options such as optim.lr, not a value"),
        ("optim: [lr]", ":1: optim: is a group of options such as optim.lr, not a value"),
        ("trainer: {max_epochs: 1.5}", ":1: trainer.max_epochs: expected int (at least 1), got '1.5'"),
        ("trainer: {accelerator: gqu}", ":1: trainer.accelerator: expected one of auto, cpu, gpu, got 'gqu'. Did you mean 'gpu'?"),
        ("method: {queue: 3, name: dno}", ":1: method.name: expected dino, got 'dno'. Did you mean 'dino'?"),
        ("optim:\n  lr: 1\n  lr: 2", ":3: key 'optim.lr' stands twice"),
        ("optim: {lr: 1}\noptim: {clip: 1}", ":2: key 'optim' stands twice"),
        ("optim: {lr: 1}\noptim.lr: 2", ":2: key 'optim.lr' stands twice"),
        ("optim: {lr: 1", ":1: not valid YAML: "),
        ("optim:\n\tlr: 1", ":2: not valid YAML: "),
        ("a: 1\n--- \nb: 1", ":2: not valid YAML: "),
        ("- optim", ": expected options as 'key: value' lines, got a sequence"),
        ("optim", ": expected options as 'key: value' lines, got a scalar"),
        ("? [a]\n: 1", ":1: expected a key, got a sequence"),
        ("a: &x\n  b: *x", "nested too deep"),
        ("1: x", ":1: unknown key '1'"),
    ],
)
def test_mistake_in_a_file(tmp_path, text, message):
    file = write(tmp_path / "x.yaml", text)
    said = error_of(load_config, file)
    assert said.startswith(f"{file}{message}") or (message in said and said.startswith(str(file)))
    assert "\n" not in said and len(said) - len(str(file)) < 220


@pytest.mark.parametrize(
    "words, message",
    [
        ("--optim.lrr 3", "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("--lr 3", "unknown option '--lr'. Did you mean '--optim.lr'?"),
        ("--dataa.root x", "unknown option '--dataa.root'. Did you mean '--data.root'?"),
        ("--zzz", "unknown option '--zzz'. Known: --method, --backbone,"),
        ("--optim.lr fast", "--optim.lr: expected float (at least 0), got 'fast'"),
        ("--optim.lr", "--optim.lr: expected float (at least 0), got nothing"),
        ("--optim.lr nan", "--optim.lr: expected float (at least 0), got 'nan'"),
        ("--optim.lr -1", "--optim.lr: expected float (at least 0), got '-1'"),
        ("--optim.lr 1 2", "unexpected argument '2' after --optim.lr 1"),
        ("--optim 3", "--optim: is a group of options such as optim.lr, not a value"),
        ("--trainer.max_epochs 0", "--trainer.max_epochs: expected int (at least 1), got '0'"),
        ("--views.flip 1.5", "--views.flip: expected float (0 to 1), got '1.5'"),
        ("--views.global_scale 0.4", "--views.global_scale: expected list of float (2 of them, 0 to 1), got ['0.4']"),
        ("--method.student_temperature 0", "--method.student_temperature: expected float (above 0), got '0'"),
        ("--run.overwrite maybe", "--run.overwrite: expected true or false, got 'maybe'"),
        ("--data.workers aut", "--data.workers: expected int or auto (at least 0), got 'aut'. Did you mean 'auto'?"),
        ("--trainer.precision fp16", "--trainer.precision: expected one of auto, bf16, fp32, got 'fp16'. Did you mean 'bf16'?"),
        ("nonsense", "unexpected argument 'nonsense'"),
        ("-lr 3", "unexpected argument '-lr'"),
        ("--config", "--config: expected a YAML file, got nothing"),
    ],
)
def test_mistake_on_the_command_line(words, message):
    assert error_of(load_config, None, words.split()).startswith(message)


def test_config_file_that_cannot_be_read(tmp_path):
    write(tmp_path / "smoke.yaml", "")
    assert error_of(load_config, tmp_path) == f"{tmp_path}: is a folder, expected a YAML file"
    assert error_of(load_config, tmp_path / "smok.yaml") == f"{tmp_path}/smok.yaml: no such config file. Did you mean 'smoke.yaml'?"
    assert error_of(load_config, tmp_path / "no" / "x.yaml") == f"{tmp_path}/no/x.yaml: no such config file."
    (tmp_path / "b.yaml").write_bytes(bytes(range(256)))
    assert error_of(load_config, tmp_path / "b.yaml") == f"{tmp_path}/b.yaml: not valid YAML: not a text file"


def test_missing_required_option_and_wrong_item_of_a_list():
    assert error_of(load_config, cls=KNNConfig) == "missing required option --checkpoint"
    assert error_of(load_config, cls=AttentionConfig) == "missing required option --checkpoint --images"
    words = "--checkpoint c --images i --formats overlay maskk".split()
    expected = "--formats: expected any of png, overlay, mask, npz, got 'maskk'. Did you mean 'mask'?"
    assert error_of(load_config, None, words, AttentionConfig) == expected
    assert load_config(None, "--checkpoint c --k 10 20".split(), KNNConfig).k == [10, 20]
    assert load_config(None, "--checkpoint c --k [10,20]".split(), KNNConfig).k == [10, 20]
    assert "expected list of int (at least 1), got '0'" in error_of(load_config, None, "--checkpoint c --k 5 0".split(), KNNConfig)


def test_synonyms_lead_to_options_that_exist():
    options = Schema(PretrainConfig).options
    assert set(SYNONYMS.values()) <= set(options)


# Methods ----------------------------------------------------------------------------------------------------------------------------


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


# Exit status and messages -----------------------------------------------------------------------------------------------------------


def test_success_passes_the_config(run, capsys):
    status, out, err, config = run("--run.seed", "7")
    assert (status, out, err, config.run.seed, config.run.name) == (0, "", "", 7, "fake")


def test_users_mistake_is_one_line_and_status_2(run):
    assert run("--fail", "user")[:3] == (2, "", "vit-suite: error: data.root: no such folder 'x'\n")
    assert run("--fail", "worker")[:3] == (2, "", "vit-suite: error: 12 of 20 files do not decode: see quarantine.txt\n")


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
    assert run(command="pretrian")[:3] == (
        2, "", "vit-suite: error: unknown command 'pretrian'. Did you mean 'pretrain'? Known: demo, pretrain, knn, attention, fake.\n"
    )  # fmt: skip
    assert run(command="--config")[0] == 2


def test_print_config_runs_nothing_and_reads_back(run, tmp_path):
    status, out, err, config = run("--run.seed", "7", "--print_config", "--method.name", "slow")
    assert (status, err, config) == (0, "", None)
    assert yaml.safe_load(out)["run"]["seed"] == 7
    run("--config", write(tmp_path / "c.yaml", out))
    assert seen[-1].method == Slow() and seen[-1].run.seed == 7


# Help -------------------------------------------------------------------------------------------------------------------------------


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


# As a process -----------------------------------------------------------------------------------------------------------------------


def process(*words, **kwargs):
    command = [sys.executable, "-X", "importtime", "-m", "vit_suite", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def imported(stderr: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    "words, absent",
    [
        ([], {"torch", "numpy", "yaml", "jsonargparse", "dataclasses", "vit_suite.config"}),
        (["--help"], {"torch", "numpy", "yaml", "jsonargparse", "dataclasses", "vit_suite.config"}),
        (["--version"], {"torch", "numpy", "yaml", "jsonargparse", "dataclasses", "vit_suite.config"}),
        (["pretrain", "--help"], {"torch", "numpy", "yaml", "jsonargparse", "pytorch_lightning", "timm"}),
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


CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_dumps(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config
