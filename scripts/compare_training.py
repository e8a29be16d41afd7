"""Trainings beside a peer's at equal CPU time: our recipes, lightly's DINO and SimCLR and the official DINO code learn
from the same images on one CPU core, and are all scored by the same exact kNN.

    python scripts/compare_training.py --data.root DIR [--minutes 20] [--recipes dino/cifar10_cpu ...] [--folder RUNS]
        [--peers lightly-dino lightly-simclr official-dino] [--official CHECKOUT] [--output FILE.json] [--plot FILE.png]

Every contender trains the network of configs/dino/cifar10_cpu.yaml (dim 128, depth 4, patch 8) on CIFAR-10, in a
process of its own with one thread; ours at the batch of their recipes, peers at 64. A trial of some steps says how many
epochs fit in --minutes, so that every schedule comes to its end. CPU minutes are those of the process, start and scores
included, for all alike. After every epoch the backbone is scored by kNN at k 20 with the online protocol (bank of
10,000, 2,000 test images).

lightly's contenders have its own heads, losses, transforms and momentum, on a timm ViT of the same size. official-dino
takes its ViT, head, loss and transforms from --official, a checkout of github.com/facebookresearch/dino; its crops have
our sizes. Optimizer and schedule are ours (AdamW, lr 1.5e-3, half an epoch of warm-up, cosine to 1e-6, weight decay
0.04), since neither has any for small images. No contender blurs: at 32 px a blur leaves little. SimCLR has temperature
0.2, as SiT's recipe here; lightly's default is 0.5.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_common import cpu
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vit_suite.config import BackboneConfig, DataConfig, EvaluateConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.hardware import autocast, pick_precision
from vit_suite.models.backbone import Backbone
from vit_suite.recipes import find

NETWORK: dict[str, Any] = {"patch_size": 8, "dim": 128, "depth": 4, "heads": 4, "drop_path": 0.0, "image_size": 32}
SIZE, LOCAL, BATCH = 32, 16, 64
RATE, LAST_RATE, WARMUP_EPOCHS, DECAY = 1.5e-3, 1e-6, 0.5, 0.04
CLIP = 3.0
TRIAL_STEPS = 30
PEERS = ("lightly-dino", "lightly-simclr", "official-dino")
DEVICE = torch.device("cpu")


def images_of(root: str) -> ImageDataModule:
    """CIFAR-10 as our trainings read it."""
    return ImageDataModule(DataConfig(name="cifar10", root=root, batch_size=BATCH))


class Scorer:
    """kNN of a timm ViT by our exact search, with the protocol of the online score of our trainings."""

    def __init__(self, data: ImageDataModule):
        self.cfg = EvaluateConfig()
        self.bank, self.test = data.bank(self.cfg.bank_size), data.test(self.cfg.test_size)
        self.backbone = Backbone(BackboneConfig(**NETWORK)).eval()

    def __call__(self, vit: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
        """Percent of the test images."""
        self.backbone.vit.load_state_dict(vit.state_dict())
        options = FeatureOptions(self.cfg.batch_size, DEVICE, pick_precision("auto", DEVICE))
        bank = extract_features(self.backbone, self.bank, [SIZE, SIZE], mean, std, options)
        test = extract_features(self.backbone, self.test, [SIZE, SIZE], mean, std, options)
        vote = KNNOptions(ks=[self.cfg.k], temperature=self.cfg.temperature, device=DEVICE)
        return knn_classify(*bank[:2], *test[:2], options=vote).top1[self.cfg.k]


@dataclass
class Peer:
    """A method of others: its networks, its views of an image, and the loss of a batch of views."""

    trained: nn.Module
    scored: nn.Module
    """The ViT inside that is scored: the teacher's where there is one."""
    views: Callable[[Any], list[Tensor]]
    """From a PIL image to its crops."""
    loss: Callable[[list[Tensor]], Tensor]
    after: Callable[[float], None]
    """What follows an optimizer step; it is given the share of the training that is done."""


def timm_vit() -> nn.Module:
    """The network as timm builds it."""
    from timm.models.vision_transformer import VisionTransformer

    shape = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
    return VisionTransformer(img_size=SIZE, num_classes=0, dynamic_img_size=True, **shape)


def momentum(done: float) -> float:
    """The teacher's momentum: from 0.99 to 1 along a cosine."""
    return 1 - 0.01 * (math.cos(math.pi * done) + 1) / 2


def lightly_dino() -> Peer:
    """lightly's DINO, with BatchNorm in the head and K 1,024 as in our recipe."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import DINOTransform

    def both() -> nn.Sequential:
        return nn.Sequential(timm_vit(), DINOProjectionHead(128, 512, 128, 1024, batch_norm=True))

    student, teacher, criterion = both(), both().requires_grad_(False), DINOLoss(1024, warmup_teacher_temp=0.04)
    teacher.load_state_dict(student.state_dict())
    scales = {"global_crop_scale": (0.4, 1.0), "local_crop_scale": (0.1, 0.4)}
    sizes = {"global_crop_size": SIZE, "local_crop_size": LOCAL, "n_local_views": 4}
    views = DINOTransform(**sizes, **scales, gaussian_blur=(0.0, 0.0, 0.0))

    def loss(crops: list[Tensor]) -> Tensor:
        found = [teacher(crop) for crop in crops[:2]]
        return criterion(found, [student(crop) for crop in crops], teacher_temp=0.04)

    return Peer(student, teacher[0], views, loss, lambda done: update_momentum(student, teacher, m=momentum(done)))


def lightly_simclr() -> Peer:
    """lightly's SimCLR."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    student, criterion = nn.Sequential(timm_vit(), SimCLRProjectionHead(128, 512, 128)), NTXentLoss(temperature=0.2)

    def loss(crops: list[Tensor]) -> Tensor:
        return criterion(*student(torch.cat(crops)).chunk(2))

    views = SimCLRTransform(input_size=SIZE, gaussian_blur=0.0, min_scale=0.2)
    return Peer(student, student[0], views, loss, lambda done: None)


def official_dino() -> Peer:
    """The DINO of its authors, with BatchNorm in the head and K 1,024 as in our recipe. Its modules must be importable.
    Its loss sums over ranks, so this process becomes a group of one."""
    import main_dino
    import utils
    import vision_transformer
    from torchvision.transforms import RandomResizedCrop

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)
    shape = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4, "qkv_bias": True}

    def both() -> nn.Module:
        vit = vision_transformer.VisionTransformer(img_size=[SIZE], norm_layer=layer_norm, **shape)
        head = vision_transformer.DINOHead(128, 1024, use_bn=True, hidden_dim=512, bottleneck_dim=128)
        return utils.MultiCropWrapper(vit, head)

    student, teacher, criterion = both(), both().requires_grad_(False), main_dino.DINOLoss(1024, 6, 0.04, 0.04, 0, 1)
    teacher.load_state_dict(student.state_dict())
    views = main_dino.DataAugmentationDINO((0.4, 1.0), (0.1, 0.4), 4)
    for chain, size in ((views.global_transfo1, SIZE), (views.global_transfo2, SIZE), (views.local_transfo, LOCAL)):
        for part in chain.transforms:
            if isinstance(part, RandomResizedCrop):
                part.size = (size, size)
            elif isinstance(part, utils.GaussianBlur):
                part.prob = -1.0

    def after(done: float) -> None:
        with torch.no_grad():
            for now, kept in zip(student.parameters(), teacher.parameters(), strict=True):
                kept.mul_(momentum(done)).add_((1 - momentum(done)) * now)

    def loss(crops: list[Tensor]) -> Tensor:
        return criterion(student(crops), teacher(crops[:2]), 0)

    return Peer(student, teacher.backbone, views, loss, after)


def rate(step: int, steps: int, epoch_steps: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine."""
    warmup = WARMUP_EPOCHS * epoch_steps
    if step < warmup:
        return RATE * (step + 1) / warmup
    return LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def train_peer(name: str, root: str, epochs: int, trial: bool) -> Iterator[dict[str, float]]:
    """Train a contender that is not ours; after every epoch its images, CPU minutes and kNN. A trial takes some steps
    and yields its CPU seconds a step."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    torch.manual_seed(0)
    data, peer = images_of(root), globals()[name.replace("-", "_")]()
    source = data.train_source

    class Views(Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> list[Tensor]:
            return peer.views(Image.fromarray(source.load(index).permute(1, 2, 0).numpy()))

    loader = DataLoader(Views(), BATCH, shuffle=True, drop_last=True)
    decayed = [parameter for parameter in peer.trained.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in peer.trained.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, precision = torch.optim.AdamW(groups, lr=RATE), pick_precision("auto", DEVICE)
    score = None if trial else Scorer(data)
    step, steps, began = 0, epochs * len(loader), time.process_time()
    for epoch in range(epochs):
        for crops in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, len(loader))
            with autocast(precision, DEVICE):
                loss = peer.loss(crops)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decayed + others, CLIP)
            optimizer.step()
            step += 1
            peer.after(step / steps)
            if trial and step == TRIAL_STEPS:
                yield {"seconds a step": (time.process_time() - began) / step}
                return
        if score is not None:
            knn = score(peer.scored, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            yield {"images": (epoch + 1) * len(loader) * BATCH, "minutes": time.process_time() / 60, "knn": knn}


def minutes_of(process: int) -> float:
    """CPU minutes that a process has had, its children that ended included."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") / 60


def started(command: list[str], log: Path) -> subprocess.Popen:
    """A contender's process, with one thread; what it says goes to `log`."""
    one = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | one)


def train_ours(recipe: str, options: argparse.Namespace, epochs: int, folder: Path) -> list[dict[str, float]]:
    """Train one of our recipes by its command; after every epoch its images, CPU minutes and kNN."""
    command = [sys.executable, "-m", "vit_suite", "pretrain", "--config", recipe, "--data.root", options.root]
    command += ["--trainer.max_epochs", str(epochs), "--evaluate.every_epochs", "1", "--trainer.threads", "1"]
    command += ["--run.output", str(folder), "--run.overwrite", "--trainer.progress", "false"]
    process = started(command, folder.with_suffix(".log"))
    rows: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(1)
        scores = scores_in(folder / "metrics.csv")
        while len(rows) < len(scores):
            epoch, knn = scores[len(rows)]
            rows.append({"epochs": epoch, "minutes": minutes_of(process.pid), "knn": knn})
    if process.returncode:
        raise SystemExit(f"{recipe} failed: {folder.with_suffix('.log')}")
    return rows


def scores_in(metrics: Path) -> list[tuple[float, float]]:
    """(epochs done, kNN) rows of a metrics.csv."""
    if not metrics.is_file():
        return []
    with metrics.open(newline="") as file:
        return [
            (float(row["epoch"]) + 1, float(row["knn/top1"])) for row in csv.DictReader(file) if row.get("knn/top1")
        ]


def seconds_of_ours(recipe: str, options: argparse.Namespace, folder: Path) -> float:
    """CPU seconds of a step of a recipe, by the difference of a long and a short trial: its start costs seconds."""
    found = []
    for steps in (5, 5 + TRIAL_STEPS):
        command = [sys.executable, "-m", "vit_suite", "pretrain", "--config", recipe, "--data.root", options.root]
        command += ["--trainer.max_steps", str(steps), "--evaluate.every_epochs", "0", "--trainer.threads", "1"]
        command += ["--run.output", str(folder), "--run.overwrite", "--trainer.progress", "false"]
        before = os.times()
        if started(command, folder.with_suffix(".log")).wait():
            raise SystemExit(f"{recipe} failed: {folder.with_suffix('.log')}")
        after = os.times()
        found.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return (found[1] - found[0]) / TRIAL_STEPS


def contend(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one contender for the minutes; its curve."""
    folder = options.folder / name.replace("/", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    steps = 50_000 // BATCH
    if name in PEERS:
        words = [sys.executable, __file__, "--data.root", options.root, "--only", name]
        words += ["--official", str(options.official)] if options.official else []
        log = folder.with_suffix(".log")
        if started([*words, "--epochs", "1", "--trial"], log).wait():
            raise SystemExit(f"{name} failed: {log}")
        seconds = json.loads(log.read_text().splitlines()[-1])["seconds a step"]
    else:
        steps = 50_000 // yaml.safe_load(find(name).read_text())["data"]["batch_size"]
        seconds = seconds_of_ours(name, options, folder)
    epochs = max(1, round(options.minutes * 60 / seconds / steps))
    print(f"{name}: {seconds:.2f} CPU seconds a step, so {epochs} epochs", flush=True)
    if name in PEERS:
        if started([*words, "--epochs", str(epochs)], log).wait():
            raise SystemExit(f"{name} failed: {log}")
        curve = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    else:
        curve = train_ours(name, options, epochs, folder)
    return {"contender": name, "epochs": epochs, "seconds a step": seconds, "curve": curve}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """kNN against CPU minutes, one line a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=110)
    for row in rows:
        curve = row["curve"]
        axes.plot([p["minutes"] for p in curve], [p["knn"] for p in curve], marker=".", label=row["contender"])
    axes.set_xlabel("CPU minutes, one core")
    axes.set_ylabel("kNN top-1 %, k 20 (bank 10,000)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Parses the options, trains every contender in turn, prints their curves, writes JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", required=True, help="where CIFAR-10 is")
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes a contender")
    parser.add_argument("--recipes", nargs="*", default=["dino/cifar10_cpu", "sit/cifar10_cpu_masked"], help="ours")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS[:2]))
    parser.add_argument("--official", type=Path, help="checkout of facebookresearch/dino, for official-dino")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="runs and logs")
    parser.add_argument("--output", type=Path, help="JSON; written anew after every contender")
    parser.add_argument("--plot", type=Path, help="PNG (pip install matplotlib)")
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "official-dino" in [*options.peers, options.only]:
        if options.official is None or not (options.official / "main_dino.py").is_file():
            parser.error("official-dino needs --official, a checkout of github.com/facebookresearch/dino")
        sys.path.insert(0, str(options.official))
    if options.only:
        for row in train_peer(options.only, options.root, options.epochs, options.trial):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for name in [*options.recipes, *options.peers]:
        rows.append(contend(name, options))
        print(name, *(f"{point['minutes']:.1f} min {point['knn']:.1f}," for point in rows[-1]["curve"]), flush=True)
        if options.output:
            options.output.write_text(
                json.dumps({"hardware": cpu(), "minutes": options.minutes, "rows": rows}, indent=1)
            )
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
