"""Attention maps and masks against DINO's visualize_attention.py."""

from __future__ import annotations

import pytest
import torch

from vit_suite.attention.maps import _ascending_mass, cls_attention, mass_mask, upsample

from .golden import largest_error, load_golden, record

NAME = "attention_masks"


@pytest.fixture(scope="module")
def golden():
    hyperparameters, tensors = load_golden(NAME)
    grid = hyperparameters["w_featmap"], hyperparameters["h_featmap"]  # the official w_featmap counts rows
    return hyperparameters, tensors, cls_attention(tensors["attentions"], 1, grid)[0]  # (h, gh, gw)


def test_cls_attention_and_upsampling(golden):
    hyperparameters, tensors, maps = golden
    size = tuple(cells * hyperparameters["patch"] for cells in maps.shape[-2:])
    record(NAME, "CLS attention", largest_error(maps.flatten(1), tensors["cls_attention"]), 0)
    record(NAME, "attention upsampled (nearest)", largest_error(upsample(maps, size), tensors["attentions_up"]), 0)


def test_masks(golden):
    hyperparameters, tensors, maps = golden
    mask = mass_mask(maps, hyperparameters["threshold"])
    size = tuple(cells * hyperparameters["patch"] for cells in maps.shape[-2:])
    record(
        NAME, "cumulative mass", largest_error(_ascending_mass(maps).sort(-1).values, tensors["cumval_sorted"]), 1e-6
    )
    record(NAME, "mask", largest_error(mask, tensors["mask_small"]), 0)
    record(NAME, "mask upsampled", largest_error(upsample(mask, size), tensors["mask_up"]), 0)


def test_batches_and_registers_change_nothing(golden):
    hyperparameters, tensors, maps = golden
    attention = tensors["attentions"]  # (1, h, T, T); put 3 register tokens behind CLS
    wide = torch.zeros(1, attention.shape[1], attention.shape[2] + 3, attention.shape[3] + 3)
    keep = torch.tensor([0, *range(4, attention.shape[3] + 3)])
    wide[:, :, keep[:, None], keep] = attention
    batch = cls_attention(wide.repeat(2, 1, 1, 1), 4, tuple(maps.shape[-2:]))
    for one in batch:
        record(
            NAME,
            "mask with registers",
            largest_error(mass_mask(one, hyperparameters["threshold"]), tensors["mask_small"]),
            0,
        )
