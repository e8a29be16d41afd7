"""What a command reads and writes is checked before torch is imported, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_suite.config import (
    AttentionConfig,
    DataConfig,
    EmbedConfig,
    KNNConfig,
    NeighboursConfig,
    PretrainConfig,
    RunOptions,
)
from vit_suite.errors import UserError
from vit_suite.parsing import load_config
from vit_suite.places import check_file, check_folder, check_places

NOBODY = 65534


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def vit_suite(*words, **options):
    command = [sys.executable, "-m", "vit_suite", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_mistyped_input_is_named_with_its_neighbour_and_without_torch(tmp_path):
    (tmp_path / "weights.pth").touch()
    words = ["knn", "--checkpoint", str(tmp_path / "weihgts.pth")]
    code = f"import sys; from vit_suite.cli import main; print(main({words}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n"
    said = f"checkpoint '{tmp_path}/weihgts.pth' does not exist. Did you mean 'weights.pth'?"
    assert done.stderr == f"vit-suite: error: {said}\n"


def test_inputs(tmp_path):
    check_places(KNNConfig("timm:vit_tiny_patch16_224"))
    check_places(KNNConfig(str(tmp_path), data=DataConfig(root=str(tmp_path / "{000..003}.tar"))))
    check_places(KNNConfig(str(tmp_path), data=DataConfig(root=str(tmp_path / "later"), download=True)))
    said = error_of(check_places, KNNConfig(str(tmp_path), data=DataConfig(root=str(tmp_path / "no"))))
    assert said == f"data.root '{tmp_path}/no' does not exist."
    (tmp_path / "link").symlink_to("gone")
    said = error_of(check_places, KNNConfig(str(tmp_path), data=DataConfig(root=str(tmp_path / "link"))))
    assert said == f"data.root '{tmp_path}/link' is a link to 'gone', which does not exist."
    said = error_of(check_places, AttentionConfig(str(tmp_path), images=str(tmp_path / "no")))
    assert said.startswith(f"images '{tmp_path}/no' does not exist.")
    assert "at most 231 are possible" in error_of(check_places, KNNConfig("x" * 300))
    assert "4,000 are possible" in error_of(check_places, KNNConfig("/".join(["x" * 100] * 100)))


def test_output_folder(tmp_path):
    check_folder("run.output", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"cannot be made: '{tmp_path}/file' is a file." in error_of(check_folder, "o", tmp_path / "file" / "x")
    assert f"'{tmp_path}/link' is a broken link" in error_of(check_folder, "o", tmp_path / "link" / "x")
    assert "is a folder; name a file in it." in error_of(check_file, "output", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_output_name_that_is_too_long(tmp_path):
    said = error_of(check_places, PretrainConfig(run=RunOptions(output=str(tmp_path / ("x" * 300)))))
    assert said == f"run.output: the name '{'x' * 77}...' has 300 bytes; at most 231 are possible."


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becomes another user")
def test_folder_of_somebody_else(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/tmp") and folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    (tmp_path / "results.json").write_text("[]")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom vit_suite.places import check_folder, check_file\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "for check, path in ((check_folder, sys.argv[1] + '/runs/x'), (check_file, sys.argv[1] + '/results.json')):\n"
        "    try:\n        check('run.output', Path(path))\n    except Exception as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()
    advice = "name another, or ask its owner for access"
    assert first == f"run.output '{tmp_path}/runs/x': '{tmp_path}' cannot be written: no permission; {advice}."
    assert (
        second == f"run.output '{tmp_path}/results.json' is there and cannot be written: no permission; name another."
    )


@pytest.mark.parametrize(
    "name, value, status, said",
    [
        ("SLURM_NODEID", "node3", 2, "SLURM_NODEID is 'node3', expected a whole number from 0 on: unset it"),
        ("WORLD_SIZE", "0", 2, "WORLD_SIZE is '0', expected a whole number from 1 on"),
        ("RANK", "-1", 2, "RANK is '-1'"),
        ("LOCAL_RANK", "\u0661", 2, "LOCAL_RANK is '\u0661'"),
        ("RANK", "", 2, "checkpoint 'gone' does not exist"),
        ("SLURM_NTASKS", " ", 2, "checkpoint 'gone' does not exist"),
    ],
)
def test_environment_of_launchers(name, value, status, said):
    done = vit_suite("knn", "--checkpoint", "gone", env=os.environ | {name: value})
    assert done.returncode == status and said in done.stderr and done.stderr.count("\n") == 1


def run_code(code, **options):
    return subprocess.run([sys.executable, "-c", code], text=True, timeout=60, **options)


TALK = """
import sys, vit_suite.cli as cli
def run(config):
    for number in range(20000):
        print("line", number)
    open(config.output, "w").write("done")
cli.COMMANDS["demo"] = cli.Command("", "vit_suite.config:DemoConfig", "__main__:run")
sys.exit(cli.main(["demo", "--output", sys.argv[1]]))
"""


@pytest.mark.parametrize("target", ["| head -1", ">&-", "2>&-", ">/dev/full"])
def test_output_that_cannot_be_written_loses_no_result(tmp_path, target):
    script, result = tmp_path / "talk.py", tmp_path / "result"
    script.write_text(TALK.replace("config.output", f"{str(result)!r}"))
    command = f"set -o pipefail; {sys.executable} {script} {tmp_path}/run {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.read_text() == "done"
    full = target == ">/dev/full"
    assert done.returncode == full
    assert done.stderr == ("vit-suite: error: the output could not be shown: No space left on device\n" if full else "")
    assert done.stdout.count("\n") == {"| head -1": 1, "2>&-": 20000}.get(target, 0)


def test_a_pipe_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="images '.*pipe' is a pipe, a socket or a device; expected a file or a folder"):
        check_places(load_config(None, {"checkpoint": "timm:x", "images": str(tmp_path / "pipe")}, AttentionConfig))


@pytest.mark.parametrize("cls", [EmbedConfig, NeighboursConfig])
def test_features_are_checked_before_torch_too(tmp_path, cls):
    given = {"checkpoint": str(tmp_path / "none.pth")} | ({"embeddings": "x"} if cls is NeighboursConfig else {})
    with pytest.raises(UserError, match="does not exist"):
        check_places(load_config(None, given, cls))
    assert load_config(None, given | {"output": "~/x.npz"}, cls).output == os.path.expanduser("~/x.npz")
