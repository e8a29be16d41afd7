"""Recipes: found by name from any folder, listed with cost and score, printed as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_suite import cli, recipes
from vit_suite.errors import UserError
from vit_suite.parsing import load_config

ROOT = Path(__file__).parents[1]


def test_every_config_is_a_recipe_with_its_facts():
    files = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(recipes.names()) == files and len(files) > 15
    for name in files:
        assert {"command", "expected", "cost"} <= set(recipes.read(name).facts), name
    assert recipes.read("dino/smoke").facts["cost"] == "about 10 s on 2 CPU cores"


def test_lines_of_one_fact_are_joined():
    expected = recipes.read("sit/cifar10_gpu_v1").facts["expected"]
    assert "ViT-B/16 on images enlarged to 224" in expected and "  " not in expected


def test_a_recipe_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_file = load_config(ROOT / "configs" / "dino" / "smoke.yaml")
    for word in ("dino/smoke", "configs/dino/smoke.yaml"):
        assert load_config(word) == by_file == load_config(None, ["--config", word])


def test_a_file_of_the_users_own_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "smoke").write_text("run: {seed: 77}\n")
    assert load_config("dino/smoke").run.seed == 77


def test_wrong_names_answer_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"unknown recipe 'dino/smok'. Did you mean 'dino/smoke'\?"):
        load_config("dino/smok")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(UserError, match=r"mine2.yaml: no such config file. Did you mean 'mine.yaml'\?"):
        load_config("mine2.yaml")


def test_the_command_lists_filters_and_prints(capsys):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{listed}" for name in recipes.names()) and "use one:" in listed
    assert cli.main(["recipes", "imagenet", "deit"]) == 0
    filtered = capsys.readouterr().out
    assert "supervised/imagenet_deit_small\n" in filtered and "dino/" not in filtered
    assert cli.main(["recipes", "show", "dino/smoke"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "dino" / "smoke.yaml").read_text()
    for words in (["recipes", "show"], ["recipes", "show", "dino/smok"], ["recipes", "nothing-like-this"]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
