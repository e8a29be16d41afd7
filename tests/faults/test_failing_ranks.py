"""One rank of two fails: both end, and status.json says why (failing_ranks.py is what they do)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults import failing_ranks

CAUSES = {
    "nan": "RuntimeError: the loss is nan at step 1",
    "memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (rank 1)",
    "callback": "ValueError: the callback broke (rank 1)",
    "score": "OSError: [Errno 28] No space left on device",
    "corrupt": "UserError: 1 of the 32 images of",
    "start": "OSError: [Errno 5] Input/output error (rank 1)",
}
STATUS = {"corrupt": 2}
"""Exit status of the rank that failed; 1 if not said. The other one always ends with 1."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    command = [sys.executable, "-m", failing_ranks.__name__, str(tmp_path_factory.mktemp("failing"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("way", failing_ranks.LAUNCHED)
def test_ranks_that_lightning_starts_end_together(outcomes, way):
    """Without torchrun (trainer.devices 2): the rank that fails is the second, or the one that started the second."""
    found = outcomes[f"launched {way}"]
    assert found["seconds"] < failing_ranks.LIMIT and not found["left"], found
    assert found["statuses"][0] not in (0, None), found
    assert found["state"] == "failed" and found["reason"].startswith(CAUSES[way]), found
    assert any(CAUSES[way].partition(": ")[2].removesuffix(" (rank 1)") in line for line in found["said"]), found


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in CAUSES if way != "start"])  # where torchrun would end the other rank
def test_one_rank_that_fails_ends_both(outcomes, way):
    found = outcomes[way]
    assert found["seconds"] < failing_ranks.LIMIT, found
    assert sorted(found["statuses"]) == sorted([1, STATUS.get(way, 1)]), found
    assert found["state"] == "failed" and found["reason"].startswith(CAUSES[way]), found
    assert all(CAUSES[way].partition(": ")[2].removesuffix(" (rank 1)") in line for line in found["said"]), found
