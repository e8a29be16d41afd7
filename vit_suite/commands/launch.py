"""`vit-suite launch`: a training as a SLURM job. What can be is checked here, not after hours in the queue."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Literal

from vit_suite.cluster.script import OPTIONS, RECORD, SCRIPT, ranks_per_node, sbatch_script
from vit_suite.cluster.slurm import queue, require_slurm, submit
from vit_suite.cluster.state import read_record, report
from vit_suite.config import LaunchConfig, PretrainConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.parsing import Given, dump_config, read_mapping, read_yaml_list, resolve


def run(cfg: LaunchConfig) -> None:
    """Submit the job, or print its script, or say how it is."""
    if cfg.status is not None:
        print(report(Path(cfg.status)))
        return
    folder = Path(cfg.run.output).absolute()
    runs = plan_runs(cfg, folder)
    script = sbatch_script(cfg, folder, [name for name in runs if name], shlex.join(["vit-suite", *sys.argv[1:]]))
    if not cfg.dry_run:
        refuse_second_job(folder)  # names the job, which the lock of its run directory would not
    check(runs)
    if cfg.dry_run:
        print(script, end="")
        return
    require_slurm()
    for name, training in runs.items():
        _write(folder / name / OPTIONS, dump_config(training))
    _write(folder / SCRIPT, script)
    job = submit(folder / SCRIPT)
    _write(folder / RECORD, json.dumps({"job": job, "runs": [name for name in runs if name]}) + "\n")
    print(
        f"job {job}: {cfg.nodes} nodes x {ranks_per_node(cfg)} ranks" + (f", {len(runs)} runs" if len(runs) > 1 else "")
    )
    where = shlex.quote(str(folder))
    print(
        f"how it is: vit-suite launch --status {where}\nits log:  "
        f" {where}/slurm-{job}{'_*' if '' not in runs else ''}.log"
    )


def plan_runs(cfg: LaunchConfig, folder: Path) -> dict[str, PretrainConfig]:
    """Name of the run's directory in `folder` ("": the folder itself) -> its training, with the nodes and devices of
    the job.

    Raises:
        UserError: an entry of the sweep is wrong, or the training contradicts the job.
    """
    base = PretrainConfig(**{field.name: getattr(cfg, field.name) for field in fields(PretrainConfig)})
    if cfg.at_once and cfg.seeds is None and cfg.sweep is None:
        raise UserError("at_once is for job arrays: give seeds or sweep too, or leave it out.")
    entries = sweep_entries(base, cfg.sweep) if cfg.sweep else {"": base}
    if cfg.seeds is None:
        runs = entries
    else:
        if len(set(cfg.seeds)) < len(cfg.seeds):
            raise UserError(f"seeds: {' '.join(map(str, cfg.seeds))}: one stands twice.")
        runs = {
            f"{name}-seed{seed}".lstrip("-"): replace(entry, run=replace(entry.run, seed=seed))
            for name, entry in entries.items()
            for seed in cfg.seeds
        }
    if not runs:
        raise UserError("seeds: expected at least one.")
    return {name: on_nodes(cfg, training, folder / name) for name, training in runs.items()}


def sweep_entries(base: PretrainConfig, path: str) -> dict[str, PretrainConfig]:
    """000, 001, ... -> `base` with the options of each entry of a YAML list. UserError with file and line where one is
    wrong."""
    common = read_mapping(asdict(base))
    runs = {}
    for number, entry in enumerate(read_yaml_list(path)):
        for key, item in entry.items():
            _refuse_in_sweep(base, key, item)
        runs[f"{number:03d}"] = resolve(PretrainConfig, common | entry)
    return runs


def _refuse_in_sweep(base: PretrainConfig, key: str, item: Given) -> None:
    """The method has options of its own, and the directory and the machines are the launcher's business."""
    if key == "method.name" and item.value != base.method.name:
        raise UserError(f"{item.where}: a sweep keeps to one method ({base.method.name}); launch another by itself.")
    if key in ("run.output", "run.overwrite", "trainer.nodes", "trainer.devices"):
        raise UserError(f"{item.where}: is the same for all runs of a sweep; give it to launch itself.")


def on_nodes(cfg: LaunchConfig, training: PretrainConfig, output: Path) -> PretrainConfig:
    """`training` as it runs in the job: its nodes, devices and directory."""
    ranks, trainer = ranks_per_node(cfg), training.trainer
    if cfg.gpus_per_node and cfg.tasks_per_node not in (None, ranks):
        raise UserError(
            f"tasks_per_node is {cfg.tasks_per_node}, but a GPU takes one process and gpus_per_node is {ranks}: leave"
            " it out."
        )
    if trainer.nodes not in (1, cfg.nodes):
        raise UserError(
            f"trainer.nodes is {trainer.nodes}, but the job has {cfg.nodes} nodes: leave it out, launch sets it."
        )
    if trainer.devices not in ("auto", ranks):
        raise UserError(
            f"trainer.devices is {trainer.devices}, but the job has {ranks} ranks a node: leave it out, launch sets it."
        )
    accelerator: Literal["gpu", "cpu"] = "gpu" if cfg.gpus_per_node else "cpu"
    if trainer.accelerator not in ("auto", accelerator):
        raise UserError(f"trainer.accelerator is {trainer.accelerator}, but gpus_per_node is {cfg.gpus_per_node}.")
    if training.run.overwrite:
        raise UserError(
            "run.overwrite would delete the run whenever its job starts again: delete the directory, or name another."
        )
    if training.drill:
        raise UserError("drill needs no cluster: `vit-suite pretrain` does it.")
    trainer = replace(trainer, nodes=cfg.nodes, devices=ranks, accelerator=accelerator)
    return replace(training, trainer=trainer, run=replace(training.run, output=str(output)))


def check(runs: dict[str, PretrainConfig]) -> None:
    """What a training would refuse when it starts, but for its data, which this machine may not see: its directory, a
    batch that does not split over the ranks, a network or a method that cannot be."""
    import torch  # for which --status need not wait

    from vit_suite.data.order import EpochPlan
    from vit_suite.data.registry import statistics
    from vit_suite.training import rundir
    from vit_suite.training.parts import method_class

    for training in runs.values():
        size, trainer = training.data.batch_size, training.trainer
        ranks = trainer.devices if isinstance(trainer.devices, int) else 1
        EpochPlan(size, size, world=trainer.nodes * ranks, accumulate=trainer.accumulate)
        rundir.check(training)
        backbone = replace(training.backbone, channels=training.data.channels, pretrained=False)
        with torch.device("meta"):  # shapes alone
            build = method_class(training)
            build(training.method, backbone, training.views, training.optim, *statistics(training.data))


def refuse_second_job(folder: Path) -> None:
    """Two jobs in one directory would write over each other's checkpoints. UserError while one is in the queue."""
    job = read_record(folder).get("job")
    if job and (alive := [entry for entry in queue(job) or [] if not entry.over]):
        raise UserError(
            f"job {job} in '{folder}' is {alive[0].state.lower()}: `scancel {job}` ends it, or name another run.output."
        )


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
