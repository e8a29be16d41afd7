"""A method under a plain Trainer with loaders of its user: without labels, streams, unknown lengths."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vit_suite.config import BackboneConfig, DINOConfig, OptimConfig
from vit_suite.errors import UserError
from vit_suite.methods.base import images_and_labels
from vit_suite.methods.dino import DINO

from .test_dino import VIEWS, make, train


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.zeros(4, 3, 8, 8), "images alone"),
        ([torch.zeros(4, 3, 8, 8)], "images alone"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 4, 4)], "no labels .B,. in second place"),
    ],
)
def test_a_loader_without_labels_is_answered_in_words(batch, found):
    with pytest.raises(UserError, match=f"yields {found}: expected .images, labels."):
        images_and_labels(batch)


def test_works_with_any_loader_of_images_and_labels(tmp_path):
    loader = DataLoader(
        TensorDataset(torch.randint(0, 256, (32, 3, 20, 24), dtype=torch.uint8), torch.zeros(32)), batch_size=8
    )
    module = DINO(
        DINOConfig(out_dim=16, hidden_dim=8, bottleneck_dim=4),
        BackboneConfig(patch_size=4, dim=8, depth=1, heads=1),
        VIEWS,
        OptimConfig(),
    )
    trainer = train(module, loader, tmp_path, epochs=1)
    assert trainer.global_step == 4 and module.global_batch == 8
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


class Stream(IterableDataset):
    """Images without end."""

    def __iter__(self):
        while True:
            yield torch.zeros(3, 32, 32, dtype=torch.uint8), 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3}, "does not say how many batches an epoch has.*limit_train_batches"),
        ({"max_epochs": -1, "limit_train_batches": 2}, "neither max_epochs nor max_steps"),
    ],
)
def test_a_training_of_unknown_length_is_refused_in_plain_words(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(make(), DataLoader(Stream(), batch_size=4), tmp_path, **options)


def test_a_stream_trains_by_steps(tmp_path):
    """Epochs of two batches, as long as max_steps says."""
    module = make()
    trainer = train(
        module, DataLoader(Stream(), batch_size=4), tmp_path, max_epochs=-1, max_steps=3, limit_train_batches=2
    )
    assert module.max_steps == trainer.global_step == 3 and module.steps_per_epoch == 2
