"""`vit-suite launch`: a command as a SLURM job."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vit_suite.cluster.plan import check, plan_once, plan_runs, refuse_second_job
from vit_suite.cluster.script import OPTIONS, RECORD, SCRIPT, ranks_per_node, sbatch_script
from vit_suite.cluster.slurm import require_slurm, submit
from vit_suite.cluster.state import report
from vit_suite.config.launch import TRAININGS
from vit_suite.errors import UserError, counted
from vit_suite.files import write_atomically
from vit_suite.parsing import dump_config


def run(cfg: Any) -> None:
    """Submit the job, or print its script, or say how it is. `cfg` is one of the classes of config/launch.py."""
    if cfg.status is not None:
        print(report(Path(cfg.status)))
        return
    training = cfg.command in TRAININGS
    if training and cfg.folder is not None:
        raise UserError("folder is for commands without a run directory: a training has run.output.")
    folder = Path(cfg.run.output if training else cfg.folder or f"jobs/{cfg.command}").absolute()
    runs = plan_runs(cfg, folder) if training else plan_once(cfg)
    script = sbatch_script(cfg, folder, [name for name in runs if name], shlex.join(["vit-suite", *sys.argv[1:]]))
    if not cfg.dry_run:
        refuse_second_job(folder)  # names the job, which the lock of its run directory would not
    if training:
        check(runs)
    if cfg.dry_run:
        print(script, end="")
        return
    require_slurm()
    for name, options in runs.items():
        _write(folder / name / OPTIONS, dump_config(options))
    _write(folder / SCRIPT, script)
    job = submit(folder / SCRIPT)
    record = {"job": job, "runs": [name for name in runs if name]} | ({} if training else {"command": cfg.command})
    _write(folder / RECORD, json.dumps(record) + "\n")
    several = f", {counted(len(runs), 'run')}" if len(runs) > 1 else ""
    where, array = shlex.quote(str(folder)), "_*" if "" not in runs else ""
    print(f"job {job}: {counted(cfg.nodes, 'node')} x {counted(ranks_per_node(cfg), 'rank')}{several}")
    print(f"how it is: vit-suite launch --status {where}")
    print(f"its log:   {where}/slurm-{job}{array}.log")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
