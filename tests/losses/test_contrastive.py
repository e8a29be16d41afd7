"""Contrastive losses beside their loops; NT-Xent's official numbers are in tests/parity/test_sit.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vit_suite.losses.contrastive import info_nce, info_nce_logits, nt_xent_logits


def views(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 5, generator=generator) for _ in range(2))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def test_nt_xent_is_its_loop():
    first, second = views(4)
    every = torch.cat([first, second])
    total = 0.0
    for i in range(8):
        rest = [math.exp(cosine(every[i], every[k]) / 0.3) for k in range(8) if k != i]
        total -= math.log(math.exp(cosine(every[i], every[(i + 4) % 8]) / 0.3) / sum(rest)) / 8
    assert F.cross_entropy(*nt_xent_logits(first, second, first, second, 0.3)).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_nt_xent_of_ranks_is_that_of_the_whole_batch(ranks):
    """The mean over ranks of each rank's rows against all rows, loss and gradient."""
    first, second = (view.requires_grad_() for view in views(8))
    whole = F.cross_entropy(*nt_xent_logits(first, second, first, second, 0.5))
    gradients = torch.autograd.grad(whole, (first, second))
    parts = []
    for rank in range(ranks):
        rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        parts.append(F.cross_entropy(*nt_xent_logits(first[rows], second[rows], first, second, 0.5, rows.start)))
    mean = sum(parts) / ranks
    torch.testing.assert_close(mean, whole)
    for ours, theirs in zip(torch.autograd.grad(mean, (first, second)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_positive_of_a_view_is_the_other_view_of_its_image():
    first, _ = views(6)
    logits, positive = nt_xent_logits(first, first + 1e-3, first, first + 1e-3, 0.5)
    assert (logits.argmax(1) == positive).all() and positive.tolist() == [*range(6, 12), *range(6)]


def test_info_nce_is_its_loop_and_its_keys_have_no_gradient():
    queries, keys = (view.requires_grad_() for view in views(5))
    logits, positive = info_nce_logits(queries[2:4], keys, 0.2, offset=2)
    loss = info_nce(logits, positive, 0.2)
    total = 0.0
    for row in (2, 3):
        scores = [math.exp(cosine(queries[row], key) / 0.2) for key in keys]
        total -= math.log(scores[row] / sum(scores)) / 2
    assert loss.item() == pytest.approx(2 * 0.2 * total, rel=1e-5)
    loss.backward()
    assert keys.grad is None and queries.grad is not None


def test_similarities_are_fp32_under_autocast():
    first, second = views(4)
    plain = F.cross_entropy(*nt_xent_logits(first, second, first, second, 0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, positive = nt_xent_logits(first, second, first, second, 0.1)
    assert logits.dtype == torch.float32 and torch.equal(F.cross_entropy(logits, positive), plain)
