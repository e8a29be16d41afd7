"""The road is one-way: a package imports only from what stands to its left, and nothing imports in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vit_suite"
ROAD = [
    "errors",
    "output",
    "environment",
    "files",
    "signals",
    "logs",
    "registry",
    "config",
    "places",
    "recipes",
    "yaml_tree",
    "options",
    "parsing",
    "distributed",
    "hardware",
    "data",
    "views",
    "models",
    "losses",
    "optim",
    "methods",
    "weights",
    "evaluation",
    "attention",
    "reports",
    "training",
    "cluster",
    "commands",
    "cli",
    "__main__",
]


def imports(path: Path) -> set[str]:
    """Every `vit_suite.*` module that a file imports, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "vit_suite":
                found |= {f"vit_suite.{alias.name}" for alias in node.names if alias.name != "__version__"}
            elif node.module:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("vit_suite.")}


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def stop(module: str) -> str:
    """The place on the road of `vit_suite.data.module`: `data`."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    here = stop(module_name(path))
    assert here in ROAD, f"{here} has no place on the road"
    for imported in imports(path):
        there = stop(imported)
        assert ROAD.index(there) <= ROAD.index(here), (
            f"{module_name(path)} imports {imported}, which stands to its right"
        )


def test_no_cycle():
    modules = {module_name(path): path for path in files()}
    graph = {}
    for name, path in modules.items():
        # `from vit_suite.views import color` imports a module as well as a package
        found = imports(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = found & set(modules) - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_torch_distributed_in_one_file():
    users = {module_name(path) for path in files() if "torch.distributed" in path.read_text().split('"""', 2)[-1]}
    assert users == {"vit_suite.distributed"}
