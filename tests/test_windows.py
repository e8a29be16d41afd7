"""What Windows' Python lacks is not needed: the names are taken away here, then the commands run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from tests.commands.conftest import words
from vit_suite.data.shards import _OpenFile

WITHOUT = """
import os, pkgutil, signal, sys
import multiprocessing.popen_fork, subprocess, torch, timm, pytorch_lightning, torchvision, torchmetrics, tqdm.auto
import torch.utils.data, torch.distributed.fsdp, torch.profiler, torch.utils.flop_counter, pytorch_lightning.loggers
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGHUP", "alarm", "setitimer"):
    delattr(signal, name)
for name in ("EX_TEMPFAIL", "sched_getaffinity", "posix_fadvise", "pread", "getuid", "geteuid", "uname"):
    delattr(os, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises ImportError
from pytorch_lightning.trainer.connectors import signal_connector
signal_connector._IS_WINDOWS = True  # Lightning then leaves these names alone too
signal.valid_signals = lambda: {getattr(signal, f"SIG{name}") for name in ("ABRT", "FPE", "ILL", "INT", "SEGV", "TERM")}
import vit_suite
for module in pkgutil.walk_packages(vit_suite.__path__, "vit_suite."):
    if module.name != "vit_suite.__main__":
        __import__(module.name)
from vit_suite import cli
from vit_suite.signals import outlive
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=600)


def test_a_training_runs_without_the_names_that_windows_lacks(tmp_path):
    done = run("pretrain", *words(run__output=tmp_path / "run", trainer__max_epochs=1))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "backbone.safetensors").is_file()


def test_profile_without_resource(tmp_path):
    options = words(run__output=tmp_path / "run", output=tmp_path / "profile", steps=1, warmup=1)
    done = run("profile", *options)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout


def test_a_drill_says_that_there_is_no_such_signal(tmp_path):
    done = run("pretrain", *words(run__output=tmp_path / "run", drill="preempt@2"))
    assert done.returncode == 2 and "drill 'preempt@2': this system has no signal for it." in done.stderr
    assert not (tmp_path / "run").exists()


def test_shards_are_read_at_offsets_without_pread(tmp_path, monkeypatch):
    """By eight threads at once, which share the one position of the file."""
    monkeypatch.delattr(os, "pread")
    content = os.urandom(1 << 16)
    (tmp_path / "shard").write_bytes(content)
    file, wrong = _OpenFile(str(tmp_path / "shard"), read_ahead=True, process=os.getpid()), []

    def read(start: int) -> None:
        for offset in range(start, 60000, 97):
            if file.read(64, offset) != content[offset : offset + 64]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and file.read(64, (1 << 16) - 10) == content[-10:]
