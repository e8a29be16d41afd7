"""manifest.csv: names of every kind read back, and no spreadsheet runs one."""

import pytest

from vit_suite.attention.manifest import read_manifest, write_manifest
from vit_suite.files import plain_cell, safe_cell

NAMES = [
    "plain.png",
    "=1+1.png",
    "+x",
    "-5.png",
    "@a",
    "x\ry.png",
    "x\ny",
    'a,"b"',
    "'=x",
    "''",
    "'quoted'",
    "caf\udce9",
]


def test_names_read_back(tmp_path):
    rows = [{"image": name, "file": name, "status": "ok", "threshold": -0.5} for name in NAMES]
    write_manifest(tmp_path / "manifest.csv", rows)
    found = read_manifest(tmp_path)
    assert [row["image"] for row in found] == NAMES and [row["file"] for row in found] == NAMES
    assert {row["threshold"] for row in found} == {"-0.5"}
    text = (tmp_path / "manifest.csv").read_bytes().decode("utf-8", "surrogateescape")
    assert "\n=" not in text and ",=" not in text and '"=' not in text  # nothing runs


@pytest.mark.parametrize("name", NAMES)
def test_cells_come_back(name):
    assert plain_cell(safe_cell(name)) == name
    assert not str(safe_cell(name)).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert safe_cell(-0.5) == -0.5
