"""The documents: every link and anchor leads somewhere, the site builds, and README leads to every page."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import vit_suite
from tests.documented import PAGES, ROOT
from vit_suite.data.source import ImageSource
from vit_suite.evaluation.features import FeatureOptions

LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    """The text without fenced blocks and inline code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))


def anchors(path: Path) -> set[str]:
    """Names of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"(?m)^#{1,6} (.+)$", re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", head.replace("`", "")).strip().lower() for head in heads)
    return {re.sub(r"[ ]", "-", head) for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in (a or b for a, b in LINK.findall(without_code(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", target):
            continue  # an address on the net, which tests do not ask
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: no heading for {target}"


def test_readme_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"](docs/{page.name})" in readme, f"README does not lead to docs/{page.name}"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80, "one screen and a half; what is longer goes to docs/"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "scores" / "index.html").is_file()


FOLDERS = "vit_suite|tests|scripts|configs|benchmarks|docs|methods|training|commands|data|models|weights|evaluation"
RECIPES = "dino|dinov2|mae|sit|supervised"
TO_WRITE = {"vit_suite/config/simclr.py", "commands/NAME.py"}
"""Files that a reader is told to write."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_recipes_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        return  # names of their time
    for name in set(re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)`", text)) - TO_WRITE:
        assert (ROOT / name).exists() or (ROOT / "vit_suite" / name).exists(), name
    for name in re.findall(rf"`((?:{RECIPES})/\w+)`", text):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"(?m)^::: (\S+)$", text)
    assert sorted(path.rpartition(".")[2] for path in named) == sorted(vit_suite.__all__)
    for path in named:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(vit_suite, name)


def test_the_container_file_copies_what_is_there_and_installs_extras_that_exist():
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"(?m)^COPY (.*)$", text) for word in line.split()[:-1]]
    assert "vit_suite" in copied and "configs" in copied and all((ROOT / word).exists() for word in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (python,) = re.findall(r"python:(3\.\d+)", text)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """docs/tour.ipynb as it stands, in a kernel of its own; it says what its text promises."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    book = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    options = {"resources": {"metadata": {"path": str(tmp_path)}}, "timeout": 300, "kernel_name": "python3"}
    done = client.NotebookClient(book, **options).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    texts = " ".join(str(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert len(pictures) == 3 and "backbone.safetensors" in texts
    top1 = float(re.search(r"20: ([\d.]+)", texts)[1])
    assert top1 > 40, "builtin:shapes against a chance of 10%"


def test_the_python_of_the_documents_runs(tmp_path, monkeypatch):
    """The blocks of docs/python.md in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(blocks) == 4 and names["maps"].shape == (64, 3, 4, 4) and names["folder"].is_dir()
    loaded, photos = names["loaded"], Photos(names["photos"])
    fp32 = FeatureOptions(precision="fp32")
    scored = names["extract_features"](loaded.backbone, photos, 32, loaded.mean, loaded.std, fp32).features
    torch.testing.assert_close(torch.nn.functional.normalize(names["features"], dim=-1), scored)


class Photos(ImageSource):
    """A tensor of images as a source."""

    name, split, classes, labels = "photos", "test", [], None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return self.images[index]
