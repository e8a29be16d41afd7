"""Values and texts that are beyond the limits of the parser."""

from typing import get_args

import pytest

from vit_suite.config import (
    METHODS,
    AttentionConfig,
    DemoConfig,
    KNNConfig,
    LaunchConfig,
    LinearConfig,
    LocalizeConfig,
    PretrainConfig,
)
from vit_suite.errors import UserError, counted
from vit_suite.options import Schema
from vit_suite.parsing import load_config

from .test_parsing import BETAS, SCALE, assert_read, error_of, write


@pytest.mark.parametrize(
    "words, key, value",
    [
        ("--trainer.max_steps 1_000", "trainer.max_steps", 1000),
        ("--trainer.max_steps +5", "trainer.max_steps", 5),
        ("--optim.clip .5", "optim.clip", 0.5),
        ("--optim.clip 5.", "optim.clip", 5.0),
        ("--run.overwrite YES", "run.overwrite", True),
        ("--run.overwrite off", "run.overwrite", False),
    ],
)
def test_spellings_of_a_value(words, key, value):
    assert_read(words, key, value)


@pytest.mark.parametrize(
    "word", ["1,5", "0x10", "\u0661\u0662", "\u00b2", "1e", "1__0", "--", "e5", "1e5x", "inf", "1e400", "5 # five", ""]
)
def test_what_is_no_number(word):
    for key in ("optim.lr", "trainer.max_epochs"):
        assert f"{key}: expected " in error_of(load_config, None, [f"--{key}={word}"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 1000 + "]" * 1000, ":1: nested too deep: expected at most 10 levels"),
        ("{a: " * 1000 + "1" + "}" * 1000, ":1: nested too deep: expected at most 10 levels"),
        ("? " * 1000 + "x", ":1: nested too deep: expected at most 10 levels"),
        ("\n".join(" " * i + "a:" for i in range(1000)), ":11: nested too deep: expected at most 10 levels"),
        ("a: &x [*x]", ":1: nested too deep: *x stands inside of what it repeats"),
        ("a: *x", ":1: not valid YAML: found undefined alias 'x'"),
        ("optim: {lr: !!python/name:os.system x}", ":1: the tag !!python/name:os.system is not for configs"),
        ("run:\n  name: !mine x", ":2: the tag !mine is not for configs: write the value alone"),
        ("views: {global_scale: !!set {a, b}}", ":1: the tag !!set is not for configs"),
        ("a: 1\n" * 300_000, ": is no config: longer than 1,000,000 bytes"),
    ],
)
def test_yaml_beyond_the_limits(tmp_path, text, message):
    assert error_of(load_config, write(tmp_path / "x.yaml", text)).startswith(f"{tmp_path}/x.yaml{message}")


def test_aliases_that_multiply_are_refused_at_once(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    said = error_of(load_config, write(tmp_path / "x.yaml", "\n".join(levels)))
    assert "x.yaml:4: has too many values: expected at most 10,000, repeated ones counted" in said


def test_core_tags_are_read_as_written(tmp_path):
    config = load_config(write(tmp_path / "x.yaml", "optim: {lr: !!float 1}\nrun: {name: !!str null}\ndata: !!null x"))
    assert (config.optim.lr, config.run.name, config.data) == (1.0, "null", PretrainConfig().data)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--run.seed 4294967296", "--run.seed: expected int (0 to 4,294,967,295), got '4294967296'"),
        (
            "--run.seed 10000000000000000000",
            "--run.seed: expected int (0 to 4,294,967,295), got '1000",
        ),
        ("--trainer.threads 100000", "--trainer.threads: expected int (1 to 1,024), got '100000'"),
        ("--data.channels 1000000000", "--data.channels: expected int (1 to 1,024), got '1000000000'"),
        (
            "--views.global_size 9223372036854775808",
            "--views.global_size: expected int or list of int (1 to 16,384, 2 of them), got",
        ),
        ("--method.out_dim 9223372036854775808", "--method.out_dim: expected int (1 to 1,048,576), got"),
        ("--views.local_crops 9223372036854775808", "--views.local_crops: expected int (0 to 1,024), got"),
        ("--optim.betas 0.9 1.0", f"--optim.betas: {BETAS} '1.0'"),
        ("--optim.min_lr 0.1", "optim.min_lr: 0.1 is above optim.lr 0.0005, which it ends at; lower it too."),
        ("--optim.lr 1e-7", "optim.min_lr: 1e-06 is above optim.lr 1e-07"),
        ("--views.global_scale 1.0 0.4", f"--views.global_scale: {SCALE} ['1.0', '0.4']"),
        ("--backbone.drop_path 1", "--backbone.drop_path: expected float (at least 0, below 1), got '1'"),
        ("--method.name sit --method.block_side 0 0.2", "--method.block_side: expected list of float (2 of them, lea"),
        ("--method.name sit --method.mask_ratio 1", "--method.mask_ratio: expected float (above 0, below 1), got '1'"),
        ("--run.output=", "--run.output: expected path, got ''"),
        ("--data.root=", "--data.root: expected path, got ''"),
        ("--method.name sit --method.drop_type []", "--method.drop_type: expected at least one of noise, zeros, got"),
    ],
)
def test_value_beyond_the_limits(words, message):
    assert error_of(load_config, None, words.split()).startswith(message)


@pytest.mark.parametrize("option", ["shots", "lr", "blocks", "pool"])
def test_empty_list_is_refused(option):
    said = error_of(load_config, None, ["--checkpoint", "c", f"--{option}", "[]"], LinearConfig)
    assert said.startswith(f"--{option}: expected at least one ") and said.endswith(", got nothing")


def test_every_number_has_a_largest_value():
    free = {"optim.clip"}
    for cls in (PretrainConfig, KNNConfig, LinearConfig, AttentionConfig, LocalizeConfig, LaunchConfig, DemoConfig):
        for method in METHODS:
            for key, option in Schema(cls, {"method.name": method}).options.items():
                kinds = {option.hint, option.item_hint, *get_args(option.hint)}
                if kinds & {int, float} and key not in free:
                    with pytest.raises(ValueError):
                        option.convert([10**39] * 2 if option.is_list else 10**39)


def test_messages_count_in_singular_and_plural():
    said = [counted(number, thing) for number, thing in ((1, "step"), (0, "image"), (1, "class"), (1200, "class"))]
    assert said == ["1 step", "0 images", "1 class", "1,200 classes"]


def test_messages_quote_80_characters():
    digits, word = "9" * 5000, "x" * 5000
    for words in (
        ["--run.seed", digits],
        ["--trainer.precision", word],
        ["--optim.lr", "1", word],
        [f"--{word}", "1"],
        [f"--optim.{word}", "1"],
        [word],
        ["--optim.betas", digits, word],
    ):
        assert len(error_of(load_config, None, words)) < 300
    assert "(5,000 characters)" in error_of(load_config, None, ["--run.seed", digits])
    assert "a number of 5,001 digits" in error_of(load_config, None, {"run.seed": 10**5000})
    assert len(error_of(load_config, None, {word: 1})) < 300


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    words = ["--run.output", "~/runs/x", "--data.root=~/data", "--start", "~/w"]
    config = load_config(None, words)
    assert (config.run.output, config.data.root) == ("/home/ada/runs/x", "/home/ada/data")
    assert config.start == "/home/ada/w"
    scores = load_config(None, ["--checkpoint", "~/c", "--output", "~/r.json"], KNNConfig)
    assert (scores.checkpoint, scores.output) == ("/home/ada/c", "/home/ada/r.json")


@pytest.mark.parametrize("method", ["dinov2", "mae"])
def test_an_option_that_a_method_lacks_for_a_reason(method):
    with pytest.raises(UserError, match=r"has no crops_at_once, because .* --backbone.checkpointing true saves memory"):
        load_config(None, ["--method.name", method, "--method.crops_at_once", "1"])
