"""Two ranks of a small training, one of which fails in some way. `failing_ranks.py FOLDER` prints what came of it.

Nobody ends the other rank, as torchrun or srun would: each has to end by itself. Ranks are forked from this process,
which has imported everything, so that the ways of failing cost seconds in all. In the ways of `LAUNCHED` Lightning
starts the second rank, by the command line of the first: `failing_ranks.py FOLDER WAY`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.cluster.rank_job import DINO, TRAINING
from vit_suite import cli
from vit_suite.methods.dino import DINO as Method
from vit_suite.training.status import read_status

LIMIT = 30.0
"""Seconds after which a rank that still lives is killed."""
STARTING = 200.0
"""Seconds in which a training that Lightning starts has to fail: its second rank imports everything."""
FAILING = 1
"""The rank that fails."""


def nan(values):
    return type(values)({**values, "loss": values["loss"] * float("nan")}, values.sums)


def out_of_memory(values):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def in_losses(change, rank):
    """Make the second step of one rank go through `change`."""
    losses = Method.losses

    def changed(self, *args, **kwargs):
        values = losses(self, *args, **kwargs)
        return change(values) if rank == FAILING and self.global_step == 1 else values

    Method.losses = changed


def in_callback(rank):
    """A callback of one rank raises, at the end of a step whose collectives are done."""
    from vit_suite.training.progress import Progress

    after = Progress.on_train_batch_end

    def broken(self, trainer, *args):
        after(self, trainer, *args)
        if rank == FAILING and trainer.global_step == 2:
            raise ValueError("the callback broke")

    Progress.on_train_batch_end = broken


def in_score(rank):
    """Rank 0 raises in a score, which all ranks take together."""
    from vit_suite.training.scores import OnlineKNN

    score = OnlineKNN.score

    def broken(self, module):
        if rank == 0:
            raise OSError(28, "No space left on device")
        return score(self, module)

    OnlineKNN.score = broken


def in_start(rank):
    """The second rank fails before the ranks have met."""
    from vit_suite.training import run

    build = run.build_parts

    def broken(*args):
        if rank == FAILING:
            raise OSError(5, "Input/output error")
        return build(*args)

    run.build_parts = broken


def photographs(folder: Path) -> Path:
    """32 images, the last of which is broken: one of two ranks meets it."""
    (folder / "train" / "a").mkdir(parents=True)
    for index in range(32):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "train" / "a" / f"{index:02d}.png")
    (folder / "train" / "a" / "31.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return folder


WAYS = {
    "nan": lambda rank: in_losses(nan, rank),
    "memory": lambda rank: in_losses(out_of_memory, rank),
    "callback": in_callback,
    "score": in_score,
    "corrupt": lambda rank: None,
    "start": in_start,
}


LAUNCHED = ("callback", "score", "start")
"""Ways that are tried with Lightning's own launcher: the rank that it started fails, or the one that started it; or the
first of these fails before the ranks have met, and then Lightning kills the other."""


def launch(way: str, folder: Path) -> int:
    """A training on 2 ranks as a shell would start it; Lightning calls this again for the second rank."""
    WAYS[way](int(os.environ.get("LOCAL_RANK", "0")))
    words = [*TRAINING, *DINO, "--method.head_batch_norm=false", f"--run.output={folder / f'launched-{way}'}"]
    return cli.main(["pretrain", *words, "--trainer.devices=2"])


def session(leader: int) -> list[int]:
    """Processes of the session of `leader` that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_session) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def launched(way: str, folder: Path) -> dict:
    """What came of `launch`. Seconds count from the moment in which status.json names the cause until no process is
    left; after LIMIT of them, the rest is counted and killed."""
    output, log = folder / f"launched-{way}", folder / f"launched-{way}.err"
    leader = os.fork()
    if not leader:
        os.setsid()
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            sys.argv[1:] = [str(folder), way]  # what Lightning starts again
            os._exit(launch(way, folder))
    failed, status, until = None, None, time.monotonic() + STARTING
    while True:
        if status is None:
            done, found = os.waitpid(leader, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if done else None
        now = read_status(output)
        if failed is None and now is not None and now.state == "failed":
            failed, until = time.monotonic(), time.monotonic() + LIMIT
        left = session(leader)
        if (status is not None and not left) or time.monotonic() > until:
            break
        time.sleep(0.05)
    seconds = time.monotonic() - (failed or until - STARTING)
    for process in left:
        os.kill(process, signal.SIGKILL)
    now = read_status(output)
    return {
        "statuses": [status],
        "seconds": seconds,
        "left": len(left),
        "state": now and now.state,
        "reason": now and now.reason,
        "said": log.read_text().strip().splitlines(),
    }


def train(way: str, folder: Path, rank: int, port: int) -> int:
    """The training of one rank, as torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "failing"}
    os.environ.update({key: str(value) for key, value in place.items()})
    WAYS[way](rank)
    words = [*TRAINING, *DINO, "--method.head_batch_norm=false", f"--run.output={folder / way}"]
    if way == "corrupt":
        words += ["--data.name=folder", f"--data.root={folder / 'photographs'}", "--data.resident=false"]
        words += ["--data.workers=0", "--data.max_corrupt=0", "--evaluate.every_epochs=0"]
    with open(folder / f"{way}{rank}.err", "w") as file:
        sys.stderr = file
        return cli.main(["pretrain", *words])


def outcome(way: str, folder: Path) -> dict:
    """Exit statuses of the ranks, seconds until the last was gone, status.json, and what the ranks said last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, living, statuses = time.monotonic(), {}, {}
    for rank in range(2):
        living[rank] = os.fork()
        if not living[rank]:
            os._exit(train(way, folder, rank, port))
    while living:
        for rank, process in list(living.items()):
            late = time.monotonic() - started > LIMIT
            if late:
                os.kill(process, signal.SIGKILL)
            done, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if done:
                del living[rank]
                statuses[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    seconds, status = time.monotonic() - started, read_status(folder / way)
    said = [(folder / f"{way}{rank}.err").read_text().strip().splitlines()[-1:] for rank in range(2)]
    return {
        "statuses": [statuses[0], statuses[1]],
        "seconds": seconds,
        "state": status and status.state,
        "reason": status and status.reason,
        "said": [line for lines in said for line in lines],
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        sys.exit(launch(sys.argv[2], place))
    photographs(place / "photographs")
    by_lightning = {f"launched {way}": launched(way, place) for way in LAUNCHED}
    print(json.dumps({way: outcome(way, place) for way in WAYS if way != "start"} | by_lightning))
