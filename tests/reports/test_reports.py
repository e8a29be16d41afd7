"""results.json, metrics.csv, tables."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from vit_suite.errors import UserError
from vit_suite.reports.results import append_result, read_results, table
from vit_suite.training.metrics import MetricsLogger


def test_results_grow(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vit-suite", "knn", "--data.root", "a folder"])
    first = append_result(path, "knn", {"k20": 51.5}, {"k": [20]}, "abc")
    second = append_result(path, "masks", {"jaccard": 0.5}, {})
    assert read_results(path) == json.loads(path.read_text()) == [first, second]
    assert (
        first["command"] == "vit-suite knn --data.root 'a folder'"
        and first["sha256"] == "abc"
        and second["sha256"] is None
    )
    assert list(path.parent.iterdir()) == [path]
    assert read_results(tmp_path / "none.json") == []


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"\xff\xfe"])
def test_a_file_that_is_none_is_left_alone(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no results file"):
        append_result(path, "knn", {}, {})
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="is a folder"):
        read_results(tmp_path)


def test_table():
    lines = table(["score", "k=10", "k=200"], [["trained", 51.234, 7.0], ["raw", 100.0, "-"]]).splitlines()
    assert lines == [
        "score      k=10  k=200",
        "-------  ------  -----",
        "trained   51.23   7.00",
        "raw      100.00      -",
    ]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder, steps, steps_done=0, **more):
    logger = MetricsLogger(folder, steps_done)
    for step in steps:
        logger.log_metrics({"loss": float(step)} | more, step)
        logger.save()


def test_metrics_are_continued_from_the_checkpoint(tmp_path):
    log(tmp_path, range(5))
    log(tmp_path, range(3, 6), steps_done=3, score=1.0)  # a new column on the way
    assert [(row["step"], row["loss"], row["score"]) for row in rows(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", "1.0"),
        ("4", "4.0", "1.0"),
        ("5", "5.0", "1.0"),
    ]


def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path):
    log(tmp_path, range(3))
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-4])
    log(tmp_path, [2, 3], steps_done=2)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "3.0"]


def test_a_start_without_a_checkpoint_begins_its_metrics_anew(tmp_path):
    log(tmp_path, range(3))
    log(tmp_path, range(2))
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]
    log(tmp_path, [], steps_done=2)  # nothing left to train
    assert len(rows(tmp_path)) == 2
