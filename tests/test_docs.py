"""The documents: every link and anchor leads somewhere, the site builds, and README leads to every page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_suite import cli, registry
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.evaluation.features import FeatureOptions
from vit_suite.parsing import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
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
    assert len(lines) <= 130, "what is longer goes to docs/"


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


# Commands


STAND_INS = {"C": "configs/dino/smoke.yaml", "NAME": "dino/smoke", "recipe.yaml": "configs/dino/smoke.yaml"}
"""What words behind `--config` stand for in the documents."""


def documented() -> list[tuple[str, str]]:
    """(page, command line) of every `vit-suite ...` in a block of code, its continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"(?ms)^```(?:sh)?\n(.*?)^```|((?:^    [^\n]*\n)+)", page.read_text(encoding="utf-8")):
            text = re.sub(r"\\\n\s*", " ", "".join(block))
            for line in text.splitlines():
                if match := re.match(r"\s*(?:\$ )?(?:torchrun .*-m vit_suite|(?:srun )?vit-suite) (.*)", line):
                    found.append((page.name, match[1].split("  #")[0].strip()))
    return found


def words_of(line: str) -> list[str]:
    """The words of a documented command; `...` stands for options that the reader adds."""
    line = line.split(" > ")[0].split(";")[0].replace("--config ...", f"--config {STAND_INS['C']}")
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    for place, word in enumerate(words[:-1]):
        if word == "--config":
            words[place + 1] = STAND_INS.get(words[place + 1], words[place + 1])
    return [word for word in words if word != "cluster.yaml"]


@pytest.mark.parametrize(("page", "line"), documented(), ids=lambda value: value[:60])
def test_documented_commands_have_options_that_exist(page, line, monkeypatch):
    """Every command of the documents is a command, and its options are options with values that convert."""
    monkeypatch.chdir(ROOT)
    if "learning_rate" in line or line.startswith(("COMMAND", "--")) or line in ("demo",):
        return  # the example of a mistake; the overview
    command, *words = words_of(line)
    assert command in cli.COMMANDS, line
    row = cli.COMMANDS[command]
    if row.words and words and not words[0].startswith("-"):
        words = [f"--{row.words}", *words]
    words = [word for word in words if word not in ("--help", "--print_config")]
    try:
        load_config(None, words, registry.load(row.config))
    except UserError as error:
        assert "missing required" in str(error), f"{page}: {line}: {error}"


def test_there_are_documented_commands():
    assert len(documented()) > 40


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
