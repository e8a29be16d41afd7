"""A method is one file and one registry row: SimCLR of small_method.py, with nothing but its row added."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from tests.commands.conftest import column, results, rows, sha256, threads, vit_suite, words  # noqa: F401 (fixtures)
from tests.training.test_rundir import stop_after
from vit_suite import registry
from vit_suite.config import METHODS, OPTIMS, VIEWS
from vit_suite.parsing import load_config
from vit_suite.registry import Column, MethodRow

ROOT = Path(__file__).parents[2]
ROW = MethodRow(
    "tests.methods.small_method:SimCLR",
    "tests.methods.small_method:SimCLRConfig",
    views="vit_suite.config.sit:SiTViewsConfig",
)
OPTIONS = {
    "method__name": "simclr",
    "method__projection_dim": 16,
    "method__out_dim": None,
    "method__hidden_dim": None,
    "method__bottleneck_dim": None,
    "method__warmup_teacher_temperature_epochs": None,
    "views__local_size": None,
    "views__local_crops": None,
}


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "simclr", ROW)


def test_the_command_line_trains_scores_exports_and_resumes_it(vit_suite, tmp_path, monkeypatch):  # noqa: F811
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert vit_suite("pretrain", *words(run__output=straight, **OPTIONS)).status == 0
    losses = column(straight, "train/loss")
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert len(column(straight, "train/accuracy")) == 8 and len(column(straight, "knn/top1")) == 2
    assert results(straight)[0]["protocol"]["method"] == "simclr"
    stop_after(monkeypatch, 3)
    assert vit_suite("pretrain", *words(run__output=run, saving__every_steps=1, **OPTIONS)).status == 1
    assert vit_suite("pretrain", *words(run__output=run, saving__every_steps=1, **OPTIONS)).status == 0
    assert sha256(run) == sha256(straight) and column(run, "train/loss") == losses
    data = ["--data.name", "shapes", "--data.image_size", 32, "--data.length", 64, "--data.test_length", 40]
    scored = vit_suite("knn", "--checkpoint", run / "checkpoints" / "last.ckpt", *data, "--output", tmp_path / "s.json")
    assert scored.status == 0, scored


def test_it_learns(vit_suite, tmp_path):  # noqa: F811
    """The loss falls below that of views that say nothing: ln(2 B - 1), B = 16."""
    options = OPTIONS | {"trainer__max_epochs": 8, "optim__lr": 0.02, "evaluate__every_epochs": 0}
    assert vit_suite("pretrain", *words(run__output=tmp_path / "run", **options)).status == 0
    assert sum(column(tmp_path / "run", "train/loss")[-4:]) / 4 < 3.0  # ln 31 = 3.43


def test_other_commands_know_it(vit_suite, tmp_path):  # noqa: F811
    profiled = vit_suite(
        "profile",
        *words(run__output=tmp_path / "run", output=tmp_path / "profile", steps=1, warmup=1, **OPTIONS),
    )
    assert profiled.status == 0 and "student forward" in profiled.out
    shown = vit_suite("pretrain", "--help", "--method.name", "simclr").out
    assert "--method.projection_dim" in shown and "Width of the projection that the loss compares." in shown
    wrong = vit_suite("pretrain", "--method.name", "simclr", "--method.projection", "3")
    assert wrong.status == 2 and "Did you mean '--method.projection_dim'?" in wrong.err
    assert "simclr" in vit_suite("pretrain", "--method.name", "simcle").err


def test_the_documents_show_the_file_that_is_tested():
    shown = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    code = Path(__file__).with_name("small_method.py").read_text(encoding="utf-8")
    assert code.partition("from __future__")[2] in shown
    assert len(code.splitlines()) < 100


# The registry
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_row_and_its_module_name_the_same_options(name):
    module = Column("module")[name]
    assert (module.config_class, module.views_class, module.optim_class) == (METHODS[name], VIEWS[name], OPTIMS[name])
    assert METHODS[name]().name == name
    assert load_config(None, {"method.name": name}).method == METHODS[name]()
    assert all(field.name == "name" or not field.name.startswith("_") for field in fields(METHODS[name]))


def test_nothing_outside_methods_branches_on_a_method():
    """No import of a method's module, no isinstance of a method or of its options, and no comparison with its name,
    outside methods/, the registry, and the lazy names of the package. `method.name` may be shown and looked up."""
    names = {name for row in registry.METHODS.values() for place in row[:2] for name in [place.partition(":")[2]]}
    modules = {row.module.partition(":")[0] for row in registry.METHODS.values()}
    found = []
    for path in sorted((ROOT / "vit_suite").rglob("*.py")):
        inside = path.relative_to(ROOT / "vit_suite")
        if inside.parts[0] in ("methods", "registry.py", "__init__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                found.append(f"{inside}:{node.lineno}: imports {node.module}")
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                asked = {child.id for child in ast.walk(node.args[1]) if isinstance(child, ast.Name)}
                if asked & names or "method" in ast.unparse(node.args[0]).split("."):
                    found.append(f"{inside}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Compare) and any(
                isinstance(side, ast.Constant) and side.value in registry.METHODS
                for side in ast.walk(node)
                if "method.name" in ast.unparse(node)
            ):
                found.append(f"{inside}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)
