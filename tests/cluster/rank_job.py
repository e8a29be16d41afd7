"""What N ranks have to do as one does it: three trainings and every evaluation, on few images whose number N does not
divide.

`python -m torch.distributed.run ... rank_job.py FOLDER` runs it on many ranks; `run(folder)` in this process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from vit_suite import cli, distributed
from vit_suite.config import DataConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.evaluation import features, knn
from vit_suite.models.batch_norm import BatchNorm1d
from vit_suite.weights.checkpoint import load_backbone

NETWORK = [
    "--backbone.patch_size=8",
    "--backbone.dim=24",
    "--backbone.depth=2",
    "--backbone.heads=3",
    "--backbone.drop_path=0.2",
]
TRAINING = [
    *NETWORK,
    "--data.name=shapes",
    "--data.image_size=32",
    "--data.length=64",
    "--data.test_length=43",
    "--data.batch_size=16",
    "--views.global_size=32",
    "--optim.lr=2e-2",
    "--optim.warmup_epochs=0.5",
    "--trainer.max_epochs=2",
    "--trainer.log_every=1",
    "--trainer.progress=false",
    "--trainer.accelerator=cpu",
    "--trainer.precision=fp32",
    "--trainer.threads=1",
    "--evaluate.bank_size=61",
    "--evaluate.test_size=37",
    "--evaluate.k=5",
    "--evaluate.batch_size=7",
]
DINO = [
    "--method.name=dino",
    "--method.out_dim=64",
    "--method.hidden_dim=32",
    "--method.bottleneck_dim=16",
    "--method.head_batch_norm=true",
    "--method.koleo_weight=0.1",
    "--method.freeze_last_layer_epochs=0",
    "--views.local_size=16",
    "--views.local_crops=2",
]
SIT = ["--method.name=sit", "--method.contrastive_dim=16", "--method.sheet_every_epochs=0"]
DINOV2 = [
    "--method.name=dinov2",
    "--method.out_dim=64",
    "--method.hidden_dim=32",
    "--method.bottleneck_dim=16",
    "--method.freeze_last_layer_epochs=0",
    "--views.local_size=16",
    "--views.local_crops=2",
    "--optim.lr_scaling=linear",
]
MAE = ["--method.name=mae", "--method.decoder_dim=16", "--method.decoder_depth=2", "--method.decoder_heads=2"]
METHODS = {
    "dino": DINO,
    "dino_in_groups": [*DINO, "--method.head_batch_norm=false", "--method.crops_at_once=1"],
    "dinov2": [
        *DINOV2,
        "--method.centering=sinkhorn_knopp",
        "--method.separate_head=true",
        "--method.head_batch_norm=true",
        "--method.gram_weight=1",
        "--method.gram_from=3",
        "--method.gram_every=2",
        "--views.gram_size=48",
    ],
    "dinov2_ema": DINOV2,
    "mae": [*MAE, "--method.sheet_every_epochs=0"],
    "crossmae": [*MAE, "--method.sheet_every_epochs=0", "--method.decoder=cross", "--method.predict_ratio=0.5"],
    "sit_v1": SIT,
    "sit_v3": [
        *SIT,
        "--method.rotation=false",
        "--method.contrastive=info_nce",
        "--method.contrastive_head=mlp",
        "--method.hidden_dim=32",
        "--method.corruption=gmml",
        "--method.drop_area=0.5",
        "--method.drop_type=zeros",
        "--method.reconstruct=corrupted",
        "--method.decoder=mlp",
        "--method.loss_weights=fixed",
        "--method.temperature=0.2",
    ],
}
SHAPES = [
    "--data.name=shapes",
    "--data.image_size=32",
    "--data.length=61",
    "--data.test_length=43",
    "--accelerator=cpu",
    "--precision=fp32",
]
"""Of the last batch of 7 and the last tile of 8 a rank has none, or a short one."""


def evaluations(folder: Path, checkpoint: Path, photographs: Path) -> dict[str, list[str]]:
    """Command lines whose results must not depend on the number of ranks."""
    cpu = ["--accelerator=cpu", "--precision=fp32"]
    scored = [f"--checkpoint={checkpoint}", f"--output={folder / 'results.json'}", *cpu]
    shapes = [*scored, *SHAPES, "--batch_size=7"]
    files = [
        *scored,
        "--data.name=folder",
        f"--data.root={photographs}",
        "--data.max_corrupt=0.2",
        "--batch_size=3",
        "--image_size=32",
    ]
    export = [f"--checkpoint={checkpoint}", f"--images={photographs}", f"--output={folder / 'attention'}", *cpu]
    return {
        "knn": ["knn", *shapes, "--k", "1", "5", "60", "--baselines"],
        "knn few-shot": ["knn", *shapes, "--k=5", "--shots", "3", "5", "--draws=2"],
        "knn of files": ["knn", *files, "--k=5"],
        "linear": ["linear", *shapes, "--epochs=2", "--baselines"],
        "linear on crops": ["linear", *shapes, "--epochs=2", "--augment=true", "--protocol=dino", "--lr=0.1"],
        "linear few-shot": ["linear", *shapes, "--shots=3", "--draws=2", "--shot_steps=5"],
        "localize": ["localize", *scored, *(word for word in SHAPES if not word.startswith("--data.length"))],
        "attention": ["attention", *export, "--formats", "npz", "mask"],
    }


def save_photographs(root: Path) -> None:
    """Two classes of pictures of several sizes; one training file is damaged."""
    random = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 5)):
        for label, brightness in (("dark", 60), ("bright", 190)):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(
                    brightness - 60, brightness + 60, (32 + 8 * (index % 3), 40, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(root / split / label / f"{index}.png")
    (root / "train" / "dark" / "4.png").write_bytes(b"cut off")


def train(folder: Path, name: str, *words: str) -> None:
    """Train, and save what was gathered from all ranks at each step beside the run's own files."""
    gathered, gather = [], distributed.gather_rows

    def watch(tensor):
        rows = gather(tensor)
        if rows.requires_grad or rows.ndim == 2 and name == "sit_v3":  # negatives, KoLeo's rows, the teacher's keys
            gathered.append(rows.detach().clone())
        return rows

    distributed.gather_rows = watch
    try:
        command = [*TRAINING, *METHODS[name], f"--run.output={folder / name}", f"--trainer.devices={world()}", *words]
        assert cli.main(["pretrain", *command]) == 0
    finally:
        distributed.gather_rows = gather
    if distributed.rank() == 0:
        torch.save(gathered, folder / name / "gathered.pt")


def batch_norm(folder: Path) -> None:
    """Outputs, gradients and statistics of the batch norm over ranks, each rank with its part of 12 rows, and of
    torch's on all."""
    rows, weights = (torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    size = 12 // distributed.world_size()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    found = []
    for norm, part in ((BatchNorm1d(5), own), (nn.BatchNorm1d(5), slice(None))):
        for _ in range(2):  # running statistics move twice
            norm.zero_grad()
            x = (10 + 3 * rows[part]).requires_grad_()
            output = norm(x)
            (output * weights[part]).square().mean().backward()
        mine = part is own
        gradients = [distributed.mean_over_ranks(p.grad) if mine else p.grad for p in norm.parameters()]  # as DDP does
        scale = distributed.world_size() if mine else 1
        tensors = [output.detach(), x.grad / scale]
        tensors = [torch.cat(distributed.gather_objects(t)) if mine else t for t in tensors]
        found.append([*tensors, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked])
    if distributed.rank() == 0:
        torch.save(found, folder / "batch_norm.pt")


def search(folder: Path, checkpoint: Path) -> None:
    """Features and nearest neighbours, of which the bank has every row twice, so that there are ties within ranks and
    between them."""
    loaded = load_backbone(checkpoint)
    source = ImageDataModule(DataConfig(name="shapes", image_size=32, length=61)).train_source
    common = (loaded.backbone, source.subset([*range(61), *range(30)]), 32, loaded.mean, loaded.std)
    whole, shared = (
        features.extract_features(
            *common, options=features.FeatureOptions(batch_size=7, precision="fp32", shared=shared)
        )
        for shared in (False, True)
    )
    options = {"ks": [3, 50], "neighbours": True, "scores": True}
    found = knn.knn_classify(
        *shared[:2],
        whole.features[:20],
        whole.labels[:20],
        rows=shared.rows,
        options=knn.KNNOptions(memory=2 * (96 * 50 + 16 * 10 + 12 * 30), **options),
    )
    alike = knn.knn_classify(
        *shared[:2], *whole[:2], rows=shared.rows, options=knn.KNNOptions(leave_one_out=True, **options)
    )
    numbers = [
        whole.features,
        found.neighbours,
        found.similarities,
        found.scores[50],
        alike.neighbours,
        alike.similarities,
    ]
    kept = sum(map(len, distributed.gather_objects(shared.features)))
    if distributed.rank() == 0:
        torch.save([*numbers, torch.tensor(kept)], folder / "search.pt")


def world() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def run(folder: Path, checkpoint: Path, photographs: Path) -> None:
    """Everything, into FOLDER."""
    features.TILE = 8
    try:
        with distributed.launched():  # once: the commands find the group there
            for command in evaluations(folder, checkpoint, photographs).values():
                assert cli.main(command) == 0, command
            search(folder, checkpoint)
            batch_norm(folder)
            for name in METHODS:
                train(folder, name)
    finally:
        features.TILE = 256


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:]))
