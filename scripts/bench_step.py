"""A DINO step (both networks, loss, backward, clipping, AdamW, EMA) on ready views: ours beside the official code, on this CPU.

    python scripts/bench_step.py [--case tiny small vits16] [--lean] [--peer DINO_CHECKOUT] [--threads N] [--output FILE.json]

Images a second (median of the rounds and their spread), FLOP of matrix products counted as they run and their share of what this machine
multiplies at best, and peak memory in a process of its own. The contenders take turns in one process, so that ratios hold on a busy
machine; CPU time says what they cost where others compute too. `--peer` is a checkout of facebookresearch/dino: its main_dino.py, utils.py
and vision_transformer.py are imported from there and run in fp32, as they do without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import add_ratios, in_turn, publish, resident
from torch.utils.flop_counter import FlopCounterMode

from vit_suite.config import BackboneConfig, DINOConfig, OptimConfig, ViewsConfig
from vit_suite.evaluation.features import cores
from vit_suite.hardware import autocast, matmul_rate, pick_precision
from vit_suite.methods.dino import DINO

CASES = {
    "tiny": {"dim": 96, "depth": 6, "heads": 3, "patch": 4, "sizes": (32, 16), "local": 4, "batch": 128, "prototypes": 4096},
    "small": {"dim": 192, "depth": 12, "heads": 3, "patch": 4, "sizes": (32, 16), "local": 8, "batch": 64, "prototypes": 4096},
    "vits16": {"dim": 384, "depth": 12, "heads": 6, "patch": 16, "sizes": (224, 96), "local": 8, "batch": 8, "prototypes": 65536},
}
LEAN: dict[str, tuple[dict, dict]] = {
    "groups of crops": ({"crops_at_once": 1}, {}),
    "checkpointing": ({}, {"checkpointing": True}),
    "both": ({"crops_at_once": 1}, {"checkpointing": True}),
}
"""Ways to need less memory: options of the method, and of the backbone."""
CPU = torch.device("cpu")


def views(case: dict) -> list[torch.Tensor]:
    """Two global and the local views of a batch, noise."""
    generator = torch.Generator().manual_seed(0)
    sides = [case["sizes"][0]] * 2 + [case["sizes"][1]] * case["local"]
    return [torch.randn(case["batch"], 3, side, side, generator=generator) for side in sides]


def ours(case: dict, precision: str, lean: str | None = None) -> Callable[[], float]:
    """One call is one step; the loss."""
    torch.manual_seed(0)
    (size, local), (method, backbone) = case["sizes"], LEAN[lean] if lean else ({}, {})
    module = DINO(
        DINOConfig(out_dim=case["prototypes"], freeze_last_layer_epochs=0, **method),
        BackboneConfig(patch_size=case["patch"], dim=case["dim"], depth=case["depth"], heads=case["heads"], drop_path=0.0, **backbone),
        ViewsConfig(global_size=size, local_size=local, local_crops=case["local"]),
        OptimConfig(),
        batch_size=case["batch"],
    )
    module.train().max_steps = 10**6
    for network in (module.student, module.teacher):
        network.backbone.set_fused_attention(False)  # as a training on a CPU has it
    optimizer, crops = module.configure_optimizers(), views(case)

    def step() -> float:
        with autocast(precision, CPU):
            loss = module.losses(crops)["loss"]
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        module.after_step(0)
        return loss.item()

    return step


def official(case: dict, checkout: Path) -> Callable[[], float]:
    """The same of the official code, on its own training loop's calls."""
    sys.path.insert(0, str(checkout))
    import main_dino
    import utils
    import vision_transformer

    if not torch.distributed.is_initialized():
        where = f"file://{tempfile.mkdtemp()}/group"
        torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    torch.manual_seed(0)

    def network() -> torch.nn.Module:
        vit = vision_transformer.VisionTransformer(
            img_size=[case["sizes"][0]],
            patch_size=case["patch"],
            embed_dim=case["dim"],
            depth=case["depth"],
            num_heads=case["heads"],
            qkv_bias=True,
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        )
        return utils.MultiCropWrapper(vit, vision_transformer.DINOHead(case["dim"], case["prototypes"]))

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = main_dino.DINOLoss(case["prototypes"], case["local"] + 2, 0.04, 0.04, 0, 1)
    optimizer, crops = torch.optim.AdamW(utils.get_params_groups(student), lr=5e-4), views(case)

    def step() -> float:
        loss = loss_of(student(crops), teacher(crops[:2]), 0)
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(0, student, 0)
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.data.mul_(0.996).add_(0.004 * ours.detach().data)
        return loss.item()

    return step


def contender(name: str, case: str, peer: Path | None) -> Callable[[], float]:
    """`ours bf16`, `ours fp32`, or one of these followed by a name of LEAN; `official fp32`."""
    who, *how = name.split(maxsplit=2)
    return ours(CASES[case], *how) if who == "ours" else official(CASES[case], peer)


def products(step: Callable[[], float]) -> int:
    """FLOP of the matrix products of a step."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def peak_memory(name: str, case: str, peer: Path | None, threads: int) -> float:
    """MiB that three steps add to a process that has imported everything."""
    words = [sys.executable, __file__, "--case", case, "--only", name, "--threads", str(threads)] + (["--peer", str(peer)] if peer else [])
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(case: str, names: list[str], peer: Path | None, rounds: int, threads: int) -> list[dict]:
    """All contenders of a case in turn, `rounds` times."""
    batch = CASES[case]["batch"]
    steps = {name: contender(name, case, peer) for name in names}
    flops = {name: products(step) / batch for name, step in steps.items()}
    times = in_turn(steps, rounds)
    rates = {precision: matmul_rate(precision, CPU) for precision in ("bf16", "fp32")}
    rows = []
    for name in names:
        row = {"case": case, "contender": name} | times[name].row(batch, "images")
        row["GFLOP an image"] = flops[name] / 1e9
        row["of matmul rate"] = row["images/s"] * flops[name] / rates[name.split()[1]]
        rows.append(row | {"peak MiB": peak_memory(name, case, peer, threads)})
    add_ratios(rows, "images")
    return rows


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="which cases (default: all)")
    parser.add_argument("--lean", action="store_true", help="ours also in groups of crops, with checkpointing, and both, for less memory")
    parser.add_argument("--peer", type=Path, help="checkout of facebookresearch/dino to run beside ours")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads (default: the cores)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        before, step = resident("VmRSS"), contender(options.only, options.case[0], options.peer)
        for _ in range(3):
            step()
        print(resident("VmHWM") - before)
        return
    names = (["ours bf16"] if pick_precision("auto", CPU) == "bf16" else []) + ["ours fp32"]
    names = [f"{names[0]} {lean}" for lean in LEAN if options.lean] + names
    names += ["official fp32"] if options.peer else []
    rows = [row for case in options.case for row in measure(case, names, options.peer, options.rounds, options.threads)]
    publish(rows, options.output, ratio_to=names[-1])


if __name__ == "__main__":
    main()
