"""The runs of seconds and the command line of tests/commands."""

from tests.commands.conftest import (  # noqa: F401 (fixtures)
    photographs,
    pretrain,
    straight_run,
    threads,
    tiny_run,
    vit_suite,
)
