"""`vit-suite profile`: some real steps of a training, and where their time goes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from vit_suite import distributed
from vit_suite.config import ProfileConfig
from vit_suite.errors import UserError, counted
from vit_suite.hardware import matmul_rate
from vit_suite.logs import speak
from vit_suite.reports.results import table
from vit_suite.training.profile import measure, summary


def run(cfg: ProfileConfig) -> None:
    """Profile, print, and write OUTPUT/trace.json and OUTPUT/profile.json."""
    speak()
    check(cfg)
    output = Path(cfg.output)
    with tempfile.TemporaryDirectory() as folder:
        recorder, about = measure(cfg, Path(folder))
    figures = summary(recorder, cfg.data.batch_size) | about
    rate = matmul_rate(about["precision"], recorder.phases.device)
    figures |= {"matmul_flops_per_second": rate, "share_of_matmul_rate": figures["flops_per_second"] / rate}
    output.mkdir(parents=True, exist_ok=True)
    recorder.profiler.export_chrome_trace(str(output / "trace.json"))
    (output / "profile.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text(figures, cfg.operators))
    print(
        f"\n{output}/trace.json: {counted(recorder.traced, 'step')}, for chrome://tracing or ui.perfetto.dev;"
        f" {output}/profile.json: these figures"
    )


def check(cfg: ProfileConfig) -> None:
    """UserError for options of a training that one process without a run directory cannot follow."""
    if cfg.trainer.nodes != 1 or cfg.trainer.devices not in ("auto", 1) or distributed.started() is not None:
        raise UserError(
            "profile looks at one process: leave trainer.devices and trainer.nodes out, and divide data.batch_size."
        )
    if cfg.trainer.strategy != "ddp":
        raise UserError(
            "trainer.strategy fsdp2 spreads the weights over ranks, and profile looks at one process: leave it out."
        )
    if cfg.drill:
        raise UserError("drill interrupts a training: `vit-suite pretrain` does it.")


def text(figures: dict[str, Any], operators: int) -> str:
    """What is printed: a few sentences, the parts of a step, its operators."""
    head = "{method} on {data}, batch {batch}, {precision}, {device}, torch {torch}".format(**figures)
    wall, cpu = 1e3 * figures["seconds"], 1e3 * figures["cpu_seconds"]
    speed = f"{figures['images_per_second']:.1f} images/s, {wall:.1f} ms a step ({cpu:.1f} of CPU time)"
    work = (
        f"{figures['flops'] / 1e9:.1f} GFLOP of matrix products a step, {figures['flops_per_second'] / 1e9:.1f} GFLOP/s"
    )
    share = (
        f"{figures['share_of_matmul_rate']:.1%} of the {figures['matmul_flops_per_second'] / 1e9:.0f} this machine"
        " multiplies at best"
    )
    memory = f"peak memory {figures['peak_bytes'] / 2**20:.0f} MiB"
    parts, shown = figures["parts"], figures["operators"]
    total, own = sum(parts.values()), sum(operator["own"] for operator in shown)
    rows = [
        [name, 1e3 * seconds, f"{seconds / total:.1%}"]
        for name, seconds in [*parts.items(), ("step, timed by part", total)]
    ]
    below = [
        [row["name"], 1e3 * row["own"], f"{row['own'] / own:.1%}", f"{row['calls']:.0f}"] for row in shown[:operators]
    ]
    return "\n\n".join(
        [
            f"{head}\n{speed}; {memory}\n{work}: {share}",
            table(["part", "ms a step", "share"], rows),
            table(["operator", "own ms a step", "share", "calls"], below),
        ]
    )
