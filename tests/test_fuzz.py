"""What strangers write never ends in a traceback: 350 cases of scripts/fuzz.py; and that the script finds faults."""

import logging
from pathlib import Path

import pytest

from vit_suite.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import fuzz

        yield fuzz


@pytest.mark.parametrize(
    ("kind", "cases"), [("options", 150), ("weights", 50), ("shards", 50), ("truth", 50), ("lists", 50)]
)
def test_no_case_is_wrong(script, kind, cases):
    counts, findings = script.fuzz(kind, cases, seed=1)
    assert not findings, "\n".join(map(str, findings))
    assert counts.total() == cases and counts["refused"] > cases / 3


def test_trainings_with_odd_values_start_or_are_refused(script):
    counts, findings = script.fuzz("start", 15, seed=1)
    assert not findings, "\n".join(map(str, findings))
    assert counts.total() == 15 and counts["accepted"] >= 3


def test_it_leaves_the_loggers_alone(script):
    log = logging.getLogger("vit_suite")
    before = log.level
    script.fuzz("options", 1, seed=1)
    assert log.level == before


def test_it_finds_what_is_wrong(script, tmp_path):
    def fail(error):
        raise error

    def judge(run):
        answer, finding = script.judge(script.Case("case", run), tmp_path)
        return answer, finding and finding.kind

    assert judge(lambda: None) == ("accepted", None)
    assert judge(lambda: "a number from five") == ("accepted", "nonsense")
    assert judge(lambda: fail(UserError("wrong"))) == ("refused", None)
    assert judge(lambda: fail(UserError("wrong" * 100))) == ("refused", "long")
    assert judge(lambda: fail(ValueError("invalid literal"))) == ("refused", "traceback")
    script.LIMIT = 1
    assert judge(lambda: [None for _ in iter(int, 1)]) == ("refused", "hang")
    script.LIMIT = 10


def test_every_option_of_every_command_is_reached(script):
    import fuzz_options

    reached = set(fuzz_options.commands())
    assert {"pretrain", "finetune", "knn", "linear", "attention", "localize", "launch", "profile", "demo"} <= reached
