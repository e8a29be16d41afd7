"""The parity table's own arithmetic: an error must not be able to hide."""

from __future__ import annotations

import math

import pytest
import torch

from .conftest import parity_table
from .golden import RECORDS, Record, largest_error, load_golden, load_metadata, record


def test_largest_error_sees_shapes_nan_and_relative_errors():
    assert largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.5
    assert largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), relative=True) == 0.25
    assert largest_error(torch.zeros(2, 1), torch.zeros(2)) == math.inf
    assert largest_error(torch.tensor([math.nan]), torch.tensor([0.0])) == math.inf
    assert largest_error(torch.tensor([math.inf]), torch.tensor([math.inf])) == 0


def test_record_fails_above_the_tolerance_and_for_nan():
    before = list(RECORDS)
    try:
        record("self", "at the tolerance", 0.5, 0.5)
        for error in (0.51, math.nan, math.inf):
            with pytest.raises(AssertionError, match="largest error"):
                record("self", "above", error, 0.5)
    finally:
        RECORDS[:] = before  # these rows are no parity results


def test_table_keeps_the_worst_of_a_row():
    rows = [
        Record("f", "x", 1e-7, 1e-6),
        Record("f", "x", 2e-5, 1e-6),
        Record("f", "x", 0.0, 1e-6),
        Record("f", "y", 0.0, 0.0),
    ]
    table = parity_table(rows)
    assert len(table) == 3
    assert "2.00e-05" in table[1] and table[1].endswith("FAILED")
    assert table[2].count("exact") == 2


def test_load_golden_reads_hyperparameters_and_tensors():
    hyperparameters, tensors = load_golden("knn")
    assert tensors["train_features"].shape == (hyperparameters["train"], hyperparameters["dim"])
    assert set(load_metadata("knn")["inputs"]) < set(tensors)
