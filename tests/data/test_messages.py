"""Warnings of libjpeg and libtiff carry the name of the file, once."""

import os
import threading

import numpy as np
import pytest
from PIL import Image

from vit_suite.data import messages
from vit_suite.data.decode import decode
from vit_suite.data.messages import Listening

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def ear(monkeypatch):
    monkeypatch.setattr(messages._ear, "named", 0)


@pytest.fixture
def damaged(tmp_path):
    """A JPEG with 30 zeros before its end, which libjpeg reads and complains about."""
    path = tmp_path / "damaged.jpg"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes()[:-2] + bytes(30) + b"\xff\xd9")
    return path


def test_a_warning_of_libjpeg_names_the_file(damaged, caplog, capfd):
    assert decode(damaged).shape == (3, 64, 64)
    warning = "Corrupt JPEG data: 29 extraneous bytes before marker 0xd9"
    assert caplog.messages == [f"{damaged}: the decoder warns: {warning}"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err.splitlines()[-1] == "after"


def test_many_lines_are_one_message_and_other_output_is_passed_on(caplog, capfd):
    with Listening("a.tif"):
        os.write(2, b"TIFFReadDirectory: Warning, one.\n" * 234 + b"50%|###\n")
    assert caplog.messages == ["a.tif: the decoder warns: TIFFReadDirectory: Warning, one. (233 more lines)"]
    assert "50%|###" in capfd.readouterr().err


def test_files_that_are_decoded_together_are_all_named(caplog):
    with Listening("a.jpg"), Listening("b.jpg"):
        os.write(2, b"Corrupt JPEG data\n")
    assert caplog.messages == ["one of b.jpg, a.jpg: the decoder warns: Corrupt JPEG data"]


def test_a_set_of_damaged_files_does_not_fill_the_log(caplog):
    for number in range(100):
        with Listening(f"{number}.jpg"):
            os.write(2, b"Corrupt JPEG data\n")
    assert len(caplog.messages) == messages.MOST_FILES + 1 and "are not shown" in caplog.messages[-1]


def test_threads_leave_the_standard_error_as_it_was(damaged, capfd):
    before = os.fstat(2).st_ino
    threads = [threading.Thread(target=lambda: [decode(damaged) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.fstat(2).st_ino == before and not messages._ear.paths
