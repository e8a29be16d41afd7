"""A training step (networks, loss, backward, clipping, AdamW, EMA) on ready views, on this CPU: DINO beside the
official code and lightly, DINOv2 and MAE beside lightly.

    python scripts/bench_step.py [--case tiny small vits16] [--lean] [--lightly] [--peer DINO_CHECKOUT] [--threads N]
    [--output FILE.json]

Images a second (median of the rounds and their spread), FLOP of matrix products counted as they run and their share of
what this machine multiplies at best, and peak memory in a process of its own. The contenders take turns in one process,
so that ratios hold on a busy machine; CPU time says what they cost where others compute too. `--peer` is a checkout of
facebookresearch/dino: its main_dino.py, utils.py and vision_transformer.py are imported from there and run in fp32, as
they do without a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import add_ratios, added, in_turn, parse, peak_memory, publish
from torch.utils.flop_counter import FlopCounterMode

from vit_suite.config import BackboneConfig, DINOConfig, OptimConfig, TrainerConfig, ViewsConfig
from vit_suite.config.dinov2 import DINOv2Config, DINOv2ViewsConfig
from vit_suite.config.mae import MAEConfig, MAEViewsConfig
from vit_suite.hardware import autocast, matmul_rate, pick_precision
from vit_suite.methods.base import Method
from vit_suite.methods.compiled import check_compile, compile_blocks
from vit_suite.methods.dino import DINO
from vit_suite.methods.dinov2 import DINOv2
from vit_suite.methods.mae import MAE

TINY = {"dim": 96, "depth": 6, "heads": 3, "patch": 4, "batch": 128}
CASES = {
    "tiny": {
        "dim": 96,
        "depth": 6,
        "heads": 3,
        "patch": 4,
        "sizes": (32, 16),
        "local": 4,
        "batch": 128,
        "prototypes": 4096,
    },
    "small": {
        "dim": 192,
        "depth": 12,
        "heads": 3,
        "patch": 4,
        "sizes": (32, 16),
        "local": 8,
        "batch": 64,
        "prototypes": 4096,
    },
    "vits16": {
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "patch": 16,
        "sizes": (224, 96),
        "local": 8,
        "batch": 8,
        "prototypes": 65536,
    },
    "tiny dinov2": {
        "method": "dinov2",
        "dim": 96,
        "depth": 6,
        "heads": 3,
        "patch": 4,
        "sizes": (32, 16),
        "local": 4,
        "batch": 128,
        "prototypes": 4096,
    },
    "tiny mae": {"method": "mae", "dim": 96, "depth": 6, "heads": 3, "patch": 4, "sizes": (32,), "batch": 128},
    "tiny crossmae": {
        "method": "crossmae",
        "dim": 96,
        "depth": 6,
        "heads": 3,
        "patch": 4,
        "sizes": (32,),
        "batch": 128,
    },
}
"""A case without `method` is DINO, for which alone there are the leaner ways and the official code."""
OF_LIGHTLY = ("dino", "dinov2", "mae")
"""Methods that lightly has."""
LEAN: dict[str, tuple[dict, dict]] = {
    "groups of crops": ({"crops_at_once": 1}, {}),
    "checkpointing": ({}, {"checkpointing": True}),
    "both": ({"crops_at_once": 1}, {"checkpointing": True}),
}
"""Ways to need less memory: options of the method, and of the backbone."""
CPU = torch.device("cpu")


def views(case: dict, device: torch.device = CPU) -> list[torch.Tensor]:
    """Two global and the local views of a batch, noise."""
    generator = torch.Generator().manual_seed(0)
    sides = [case["sizes"][0]] * 2 + [case["sizes"][1]] * case["local"] if "local" in case else case["sizes"]
    return [torch.randn(case["batch"], 3, side, side, generator=generator).to(device) for side in sides]


def method_of(case: dict, method: dict, backbone: dict) -> Method:
    """The method of a case, with further options of it and of the backbone."""
    size = case["sizes"][0]
    shape = {"patch_size": case["patch"], "dim": case["dim"], "depth": case["depth"], "heads": case["heads"]}
    network = BackboneConfig(**shape, drop_path=0.0, **backbone)
    name = case.get("method", "dino")
    if "mae" in name:
        how = {"decoder": "cross", "predict_ratio": 0.25} if name == "crossmae" else {}
        options = MAEConfig(decoder_dim=64, decoder_depth=2, decoder_heads=4, **how, **method)
        return MAE(options, network, MAEViewsConfig(global_size=size), batch_size=case["batch"])
    crops = {"global_size": size, "local_size": case["sizes"][1], "local_crops": case["local"]}
    if name == "dinov2":
        options = DINOv2Config(out_dim=case["prototypes"], freeze_last_layer_epochs=0, **method)
        return DINOv2(options, network, DINOv2ViewsConfig(**crops), batch_size=case["batch"])
    options = DINOConfig(out_dim=case["prototypes"], freeze_last_layer_epochs=0, **method)
    return DINO(options, network, ViewsConfig(**crops), OptimConfig(), batch_size=case["batch"])


def ours(
    case: dict, precision: str, lean: str | None = None, device: torch.device = CPU, compile: str = "none"
) -> Callable[[], torch.Tensor]:
    """One call is one step, which a GPU is not waited for; the loss. `compile`: as trainer.compile."""
    torch.manual_seed(0)
    module = method_of(case, *(LEAN[lean] if lean else ({}, {})))
    module.to(device).train().max_steps = 10**6
    check_compile(TrainerConfig(compile=compile), device)
    if compile != "none":
        compile_blocks(module, graphs=compile == "graphs")
    optimizer, crops = module.configure_optimizers(), views(case, device)

    def step() -> torch.Tensor:
        if compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(precision, device):
            values = module.losses(crops)
        optimizer.zero_grad()
        values["loss"].backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        if values.sums:
            module.use_sums(values.sums)
        module.after_step(0)
        return values["loss"].detach()

    return step


def official(
    case: dict, checkout: Path, precision: str = "fp32", device: torch.device = CPU
) -> Callable[[], torch.Tensor]:
    """The same of the official code, on its own training loop's calls: it reads the loss in every step, and scales it
    for fp16."""
    sys.path.insert(0, str(checkout))
    import main_dino
    import utils
    import vision_transformer

    if not torch.distributed.is_initialized():
        where = f"file://{tempfile.mkdtemp()}/group"
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", init_method=where, rank=0, world_size=1
        )
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

    student, teacher = network().to(device), network().to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = main_dino.DINOLoss(case["prototypes"], case["local"] + 2, 0.04, 0.04, 0, 1).to(device)
    optimizer, crops = torch.optim.AdamW(utils.get_params_groups(student), lr=5e-4), views(case, device)
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            loss = loss_of(student(crops), teacher(crops[:2]), 0)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of the official code is {loss.item()}")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(0, student, 0)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.data.mul_(0.996).add_(0.004 * ours.detach().data)
        return loss.detach()

    return step


def lightly(case: dict, precision: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """One call is one step of lightly's DINO, DINOv2 or MAE; the loss."""
    import lightly_steps

    torch.manual_seed(0)
    return lightly_steps.STEPS[case.get("method", "dino")](case, views(case, device), precision, device)


def contender(name: str, case: str, peer: Path | None) -> Callable[[], torch.Tensor]:
    """`ours bf16`, `ours fp32`, or one of these followed by a name of LEAN; `lightly bf16`, `lightly fp32`; `official
    fp32`."""
    who, *how = name.split(maxsplit=2)
    if who == "lightly":
        return lightly(CASES[case], *how, CPU)
    return ours(CASES[case], *how) if who == "ours" else official(CASES[case], peer)


def products(step: Callable[[], torch.Tensor]) -> int:
    """FLOP of the matrix products of a step."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def repeat(step: Callable[[], torch.Tensor], count: int) -> None:
    """Some steps."""
    for _ in range(count):
        step()


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
        rows.append(row | {"peak MiB": peak_memory(name, "--case", case)})
    add_ratios(rows, "images")
    return rows


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", choices=list(CASES), default=list(CASES), help="which cases (default: all)"
    )
    parser.add_argument(
        "--lean",
        action="store_true",
        help="ours also in groups of crops, with checkpointing, and both, for less memory",
    )
    parser.add_argument("--lightly", action="store_true", help="lightly's steps too (pip install 'vit-suite[bench]')")
    options = parse(parser, "steps")
    if options.only:
        print(added(lambda: repeat(contender(options.only, options.case[0], options.peer), 3)))
        return
    names = (["ours bf16"] if pick_precision("auto", CPU) == "bf16" else []) + ["ours fp32"]
    names = [f"{names[0]} {lean}" for lean in LEAN if options.lean] + names
    names += [name.replace("ours", "lightly") for name in names if options.lightly and name.count(" ") == 1]
    names += ["official fp32"] if options.peer else []
    rows = []
    for case in options.case:
        method = CASES[case].get("method", "dino")
        own = [name for name in names if name in ("ours bf16", "ours fp32") or method == "dino"]
        own += [name for name in names if name.startswith("lightly") and method != "dino" and method in OF_LIGHTLY]
        rows += measure(case, own, options.peer, options.rounds, options.threads)
    publish(rows, options.output, ratio_to=names[-1])


if __name__ == "__main__":
    main()
