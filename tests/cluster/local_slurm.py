"""A cluster of four nodes on this machine (scripts/local_slurm.sh), and trainings slow enough to be interrupted in
it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands.conftest import words
from vit_suite import cli
from vit_suite.cluster.slurm import OVER
from vit_suite.training.status import read_status

SCRIPT = Path(__file__).parents[2] / "scripts" / "local_slurm.sh"
PATIENCE = 600
"""Seconds for anything to happen: a start of four processes takes 10 on two idle cores, and many times that on busy
ones."""

PACED = """#!{python}
# `python -m vit_suite ... --config RUN/launch.yaml` with a pause after every step, except where SLURM starts a job
# again that has got as far as a checkpoint.
import os, pathlib, sys, time
from vit_suite import cli
from vit_suite.training.keeper import Keeper

last = pathlib.Path(sys.argv[-1]).parent / "checkpoints" / "last.ckpt"
if not ("SLURM_RESTART_COUNT" in os.environ and last.exists()):
    after = Keeper.on_train_batch_end

    def paused(self, *arguments):
        time.sleep({pause})
        after(self, *arguments)

    Keeper.on_train_batch_end = paused
sys.exit(cli.main(sys.argv[3:]))
"""


def missing() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    path = os.environ["PATH"] + ":/usr/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=path)]
    return f"no {', '.join(absent)} here: scripts/local_slurm.sh install" if absent else None


class Cluster:
    """Runs while the process it starts has an open stdin: it ends with this process, however that ends."""

    def __init__(self, folder: Path):
        self.folder, self.history = folder, {}
        port = 20000 + 5 * (os.getpid() % 2000)  # the nodes take the four after it
        root = (
            Path(tempfile.gettempdir()) / f"slurm-of-{os.getpid()}"
        )  # munge wants a folder that all may enter, and pytest's are private
        settings = {"LOCAL_SLURM_ROOT": str(root), "LOCAL_SLURM_PORT": str(port), "LOCAL_SLURM_NODES": "4"}
        command = ["bash", str(SCRIPT), "exec", "sh", "-c", "echo up; cat"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=os.environ | settings, text=True, **pipes)
        if self.process.stdout.readline() != "up\n":
            raise RuntimeError(self.process.communicate()[1])
        self.variables = {"SLURM_CONF": str(root / "slurm.conf"), "PYTHONPATH": str(SCRIPT.parents[1])}

    def stop(self) -> None:
        self.process.communicate(timeout=PATIENCE)

    def call(self, *command: object) -> str:
        """Output of a command, which has to succeed."""
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, env=os.environ | self.variables
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    # Trainings
    # ------------------------------------------------------------------------------------------------------------------

    def launch(self, run: Path, *launcher: object, pause: float = 0, **options) -> str:
        """The job of a tiny training, 2 nodes x 2 ranks, by `vit-suite launch`."""
        if pause:
            python = self.folder / f"paced-{pause}"
            python.write_text(PACED.format(python=sys.executable, pause=pause))
            python.chmod(0o755)
            launcher += ("--python", python)
        size = [] if "--nodes" in launcher else ["--nodes", 2, "--tasks-per-node", 2]
        words_ = ["launch", "--gpus-per-node", 0, *size, *launcher, *words(run__output=run, **options)]
        assert cli.main([str(word) for word in words_]) == 0
        return re.search(r'"job": "(\d+)"', (run / "launch.json").read_text())[1]

    def state(self, job: str) -> dict[str, str]:
        """JobState, Restarts, Reason, ... of `scontrol show job`; changes are kept in `history`."""
        fields = dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))
        seen = self.history.setdefault(job, [])
        now = {key: fields[key] for key in ("JobState", "Restarts", "Reason", "Partition")}
        if not seen or seen[-1][1] != now:
            seen.append((time.strftime("%H:%M:%S"), now))
        return fields

    def wait(self, job: str, what: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """The state of the job once `condition` holds of it."""
        end = time.monotonic() + PATIENCE
        while not condition(state := self.state(job)):
            assert time.monotonic() < end, (
                f"job {job} never came to: {what}; it is {state['JobState']}\n{self.log(job)}"
            )
            time.sleep(0.2)
        return state

    def wait_for_step(self, job: str, run: Path, step: int) -> int:
        """The step the training says it has done, from `step` on."""

        def there(state: dict[str, str]) -> bool:
            assert state["JobState"] not in OVER, f"{state['JobState']}\n{self.log(job)}"
            status = read_status(run)
            return (
                state["JobState"] == "RUNNING"
                and status is not None
                and status.state == "running"
                and status.step >= step
            )

        self.wait(job, f"step {step}", there)
        return read_status(run).step

    def finish(self, job: str) -> dict[str, str]:
        """The state of the job when it has ended, which must be well."""
        state = self.wait(job, "its end", lambda state: state["JobState"] in OVER)
        assert state["JobState"] == "COMPLETED", f"{state['JobState']} {state['Reason']}\n{self.log(job)}"
        return state

    def nodes(self, job: str) -> list[str]:
        """The nodes of a running job."""
        return self.call("scontrol", "show", "hostnames", self.state(job)["NodeList"]).split()

    def log(self, job: str) -> str:
        """What the job has written, and the states it went through."""
        path = Path(dict(re.findall(r"(StdOut)=(.*)", self.call("scontrol", "show", "job", job)))["StdOut"].strip())
        states = "\n".join(
            f"{moment} {' '.join(f'{key}={value}' for key, value in now.items())}"
            for moment, now in self.history.get(job, [])
        )
        return f"{path.read_text() if path.exists() else 'no log'}\n{states}"


def rank_pid(job: str, rank: int) -> int:
    """The process of a rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                wanted <= set((folder / "environ").read_bytes().split(b"\0"))
                and b"pretrain" in (folder / "cmdline").read_bytes()
            ):
                return int(folder.name)
        except OSError:  # another process, gone meanwhile
            continue
    raise AssertionError(f"no rank {rank} of job {job}")
