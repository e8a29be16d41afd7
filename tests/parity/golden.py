"""Golden numbers: what the official code computed, read with the shapes and hyperparameters that it was run with.

A fixture is a safetensors file whose metadata has one key, `golden`: JSON with `hyperparameters`, `inputs` (names of
the tensors that went in; all others came out), `fixture` and `seed`. The folder is $VIT_SUITE_GOLDEN, or the copy in
tests/golden; it may hold other sizes and seeds, so tests take every shape, head count and hyperparameter from here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Record:
    """One row of the parity table."""

    fixture: str
    what: str
    largest_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest_error <= self.tolerance  # False for NaN


RECORDS: list[Record] = []


def golden_folder() -> Path:
    """$VIT_SUITE_GOLDEN, or tests/golden."""
    return Path(os.environ.get("VIT_SUITE_GOLDEN") or Path(__file__).parents[1] / "golden")


def golden_path(name: str, suffix: str = ".safetensors") -> Path:
    """Path of a fixture; FileNotFoundError says which folder lacks it (a missing fixture is a failure, never a silent
    skip)."""
    path = golden_folder() / f"{name}{suffix}"
    if not path.is_file():
        raise FileNotFoundError(
            f"no golden fixture {path}; VIT_SUITE_GOLDEN names the folder, tests/golden is the default"
        )
    return path


def load_metadata(name: str) -> dict:
    """The whole `golden` entry of a fixture: hyperparameters, inputs, fixture, seed."""
    with safe_open(golden_path(name), framework="pt") as file:
        return json.loads(file.metadata()["golden"])


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(hyperparameters, all tensors by name) of `name`.safetensors, inputs and outputs of the official code alike."""
    with safe_open(golden_path(name), framework="pt") as file:
        hyperparameters = json.loads(file.metadata()["golden"])["hyperparameters"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    return hyperparameters, tensors


def load_golden_json(name: str) -> dict:
    """The content of `name`.json (param_groups)."""
    return json.loads(golden_path(name, ".json").read_text())


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name starts with `prefix`, without it: `with_prefix(tensors, "state.")` is a state_dict."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def largest_error(ours, golden, relative: bool = False) -> float:
    """max |ours - golden| (over |golden| when `relative`), in float64; inf for other shapes or a NaN."""
    # Lists of Python floats become float64: torch's default would round them to fp32.
    ours, golden = (
        value.detach().double().cpu() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        for value in (ours, golden)
    )
    if ours.shape != golden.shape:
        return math.inf
    if ours.numel() == 0:
        return 0.0
    error = (ours - golden).abs()
    error = torch.where(ours == golden, torch.zeros_like(error), error)  # equal infinities differ by 0, not by NaN
    if relative:
        error = error / golden.abs().clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.nan_to_num(nan=math.inf).max())


def record(fixture: str, what: str, error: float, tolerance: float) -> None:
    """Put a row into the parity table of the terminal summary, then fail the test unless error <= tolerance (NaN
    fails)."""
    row = Record(fixture, what, float(error), float(tolerance))
    RECORDS.append(row)
    assert row.passed, f"{fixture}: {what}: largest error {row.largest_error:.3g} > tolerance {row.tolerance:.3g}"
