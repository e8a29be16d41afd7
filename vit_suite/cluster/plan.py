"""What a job of `vit-suite launch` runs: the options of each training, with the nodes and devices of the job. What can
be checked is checked here, not after hours in the queue."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from vit_suite.cluster.script import ranks_per_node
from vit_suite.cluster.slurm import queue
from vit_suite.cluster.state import read_record
from vit_suite.config import PretrainConfig
from vit_suite.config.launch import JobOptions
from vit_suite.errors import UserError
from vit_suite.parsing import Given, read_mapping, read_yaml_list, resolve


def command_options(cfg: Any) -> Any:
    """The options of the command alone, without those of the job."""
    (kind,) = (base for base in type(cfg).__bases__ if base is not JobOptions)
    return kind(**{field.name: getattr(cfg, field.name) for field in fields(kind)})


def plan_once(cfg: Any) -> dict[str, Any]:
    """The options of a command that is no training. UserError for options of the job that only a training has."""
    for name in ("seeds", "sweep", "at_once"):
        if getattr(cfg, name) is not None:
            raise UserError(f"{name} is for trainings (pretrain, finetune): launch {cfg.command} runs once.")
    if cfg.gpus_per_node and cfg.accelerator == "cpu":
        raise UserError(f"accelerator is cpu, but gpus_per_node is {cfg.gpus_per_node}: give --gpus-per-node 0.")
    if not cfg.gpus_per_node and cfg.accelerator == "gpu":
        raise UserError("accelerator is gpu, but gpus_per_node is 0.")
    return {"": command_options(cfg)}


def plan_runs(cfg: Any, folder: Path) -> dict[str, Any]:
    """Name of the run's directory in `folder` ("": the folder itself) -> its training, with the nodes and devices of
    the job.

    Raises:
        UserError: an entry of the sweep is wrong, or the training contradicts the job.
    """
    base = command_options(cfg)
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


def sweep_entries(base: Any, path: str) -> dict[str, Any]:
    """000, 001, ... -> `base` with the options of each entry of a YAML list. UserError with file and line where one is
    wrong."""
    common = read_mapping(asdict(base))
    runs = {}
    for number, entry in enumerate(read_yaml_list(path)):
        for key, item in entry.items():
            _refuse_in_sweep(base, key, item)
        runs[f"{number:03d}"] = resolve(type(base), common | entry)
    return runs


def _refuse_in_sweep(base: Any, key: str, item: Given) -> None:
    """The method has options of its own, and the directory and the machines are the launcher's business."""
    if key == "method.name" and item.value != base.method.name:
        raise UserError(f"{item.where}: a sweep keeps to one method ({base.method.name}); launch another by itself.")
    if key in ("run.output", "run.overwrite", "trainer.nodes", "trainer.devices"):
        raise UserError(f"{item.where}: is the same for all runs of a sweep; give it to launch itself.")


def on_nodes(cfg: Any, training: Any, output: Path) -> Any:
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
    if getattr(training, "drill", None):
        raise UserError("drill needs no cluster: `vit-suite pretrain` does it.")
    trainer = replace(trainer, nodes=cfg.nodes, devices=ranks, accelerator=accelerator)
    return replace(training, trainer=trainer, run=replace(training.run, output=str(output)))


def check(runs: dict[str, Any]) -> None:
    """Check what a training would refuse at its start: a batch that does not split over the ranks, its directory, and
    a network or a method that is impossible. Not its data, which only the nodes may see, and of a fine-tuning not the
    network, which is in its checkpoint."""
    import torch  # not at the top of the file: --status need not wait for it

    from vit_suite.data.order import EpochPlan
    from vit_suite.data.registry import statistics
    from vit_suite.training import rundir
    from vit_suite.training.parts import method_class

    for training in runs.values():
        size, trainer = training.data.batch_size, training.trainer
        ranks = trainer.devices if isinstance(trainer.devices, int) else 1
        EpochPlan(size, size, world=trainer.nodes * ranks, accumulate=trainer.accumulate)
        if not isinstance(training, PretrainConfig):
            continue
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
