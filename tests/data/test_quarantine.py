"""The list of bad files, and when there are too many."""

import pytest

from vit_suite.data.decode import DecodeError
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import UserError


def test_quarantine_lists_once_counts_and_stops(tmp_path):
    file = tmp_path / "run" / "quarantine.txt"
    quarantine = Quarantine(file, limit=0.1)
    quarantine.report([], "set train", 20)
    assert not file.parent.exists()  # no trace without a bad file
    quarantine.report([DecodeError("a\tb.jpg", "cut\nshort")], "set train", 20)
    quarantine.report([DecodeError("a\tb.jpg", "cut short"), DecodeError("ü c.jpg", "empty")], "set train", 20)
    assert file.read_text(encoding="utf-8") == "a\\tb.jpg\tcut short\nü c.jpg\tempty\n" and len(quarantine) == 2
    resumed = Quarantine(file, limit=0.1)
    resumed.report([DecodeError("ü c.jpg", "empty")], "set train", 20)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(UserError) as caught:
        quarantine.report([DecodeError("d.jpg", "bad")], "set train", 20)
    message = str(caught.value)
    assert (
        "3 of the 20 images of set train" in message
        and "15.0%" in message
        and "allows 10.0%" in message
        and str(file) in message
        and message.endswith("--data.max_corrupt 0.15 goes on without them.")
    )
    assert file.read_text(encoding="utf-8").count("d.jpg") == 1  # listed before stopping


def test_one_file_never_ends_a_run():
    """1% of 44 photographs is no whole file. Two are too many, and 0 means none."""
    quarantine = Quarantine(limit=0.01)
    quarantine.report([DecodeError("a", "x")], "photos", 44)
    with pytest.raises(UserError, match="2 of the 44"):
        quarantine.report([DecodeError("b", "x")], "photos", 44)
    with pytest.raises(UserError, match="1 of the 44"):
        Quarantine(limit=0).report([DecodeError("a", "x")], "photos", 44)


def test_quarantine_counts_sets_apart_and_mends_a_cut_line(tmp_path):
    file = tmp_path / "quarantine.txt"
    file.write_bytes(b"old.jpg\tcut by a cra")
    quarantine = Quarantine(file, limit=0.5)
    quarantine.report([DecodeError("a", "x")], "train", 2)
    quarantine.report([DecodeError("b", "x")], "test", 2)
    assert file.read_bytes() == b"old.jpg\tcut by a cra\na\tx\nb\tx\n"
    with pytest.raises(UserError, match="max_corrupt is 2"):
        Quarantine(None, 2)
