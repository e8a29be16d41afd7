"""Options from files, command line and Python: precedence, values, and every kind of mistake."""

from pathlib import Path

import pytest

from vit_suite.config import (
    METHODS,
    AttentionConfig,
    DemoConfig,
    KNNConfig,
    PretrainConfig,
)
from vit_suite.errors import UserError
from vit_suite.options import Schema
from vit_suite.parsing import dump_config, load_config


def write(path, text):
    path.write_text(text)
    return path


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Precedence and values
# --------------------------------------------------------------------------------------------------------------


def test_command_line_wins_over_file_over_default(tmp_path):
    file = write(tmp_path / "a.yaml", "optim: {lr: 1e-3, clip: 0}\nviews:\n  local_crops: 4\n")
    for words in (["--config", file, "--optim.lr", "2e-3"], ["--optim.lr", "2e-3", "--config", file]):
        config = load_config(None, [str(word) for word in words])
        assert (config.optim.lr, config.optim.clip, config.views.local_crops) == (2e-3, 0.0, 4)
        assert config.optim.min_lr == PretrainConfig().optim.min_lr
    assert load_config(file).optim.lr == 1e-3
    assert load_config().optim.lr == PretrainConfig().optim.lr


def test_later_file_wins_over_earlier(tmp_path):
    first, second = write(tmp_path / "1.yaml", "optim: {lr: 1, clip: 1}"), write(tmp_path / "2.yaml", "optim: {lr: 2}")
    for words in (["--config", first, "--config", second], ["--config", first, second]):
        config = load_config(None, [str(word) for word in words])
        assert (config.optim.lr, config.optim.clip) == (2.0, 1.0)


def assert_read(words: str, key: str, value: object) -> None:
    """These words give the option `key` this value, of this type."""
    group, name = key.split(".")
    got = getattr(getattr(load_config(None, words.split()), group), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "words, key, value",
    [
        ("--optim.lr 1e-3", "optim.lr", 1e-3),
        ("--optim.lr=5E-4", "optim.lr", 5e-4),
        ("--optim.lr 1", "optim.lr", 1.0),
        ("--optim.lr 1 --optim.lr 2", "optim.lr", 2.0),
        ("--trainer.max_steps -1", "trainer.max_steps", -1),
        ("--views.local-crops 3", "views.local_crops", 3),
        ("--run.overwrite", "run.overwrite", True),
        ("--run.overwrite true", "run.overwrite", True),
        ("--run.overwrite --optim.lr 1", "run.overwrite", True),
        ("--run.overwrite no", "run.overwrite", False),
        ("--data.resident", "data.resident", True),
        ("--data.resident auto", "data.resident", "auto"),
        ("--data.workers 3", "data.workers", 3),
        ("--data.workers auto", "data.workers", "auto"),
        ("--views.global_scale 0.4 1.0", "views.global_scale", [0.4, 1.0]),
        ("--views.global_scale [0.4,1]", "views.global_scale", [0.4, 1.0]),
        ("--data.mean 0.5", "data.mean", [0.5]),
        ("--data.mean null", "data.mean", None),
        ("--backbone.image_size 32 48", "backbone.image_size", [32, 48]),
        ("--data.root 2024", "data.root", "2024"),
        ("--data.root=a=b", "data.root", "a=b"),
        ("--run.name no", "run.name", "no"),
        ("--run.name null", "run.name", "null"),
        ("--data.root null", "data.root", None),
    ],
)
def test_value_on_the_command_line(words, key, value):
    assert_read(words, key, value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("optim: {lr: 1e-3}", "optim.lr", 1e-3),
        ("optim: {lr: 1}", "optim.lr", 1.0),
        ("optim.lr: 1e-3", "optim.lr", 1e-3),
        ("run: {name: 2024}", "run.name", "2024"),
        ("run: {name: no}", "run.name", "no"),
        ("run: {overwrite: yes}", "run.overwrite", True),
        ("data: {root: }", "data.root", None),
        ("data: {root: ~}", "data.root", None),
        ("data: {workers: auto}", "data.workers", "auto"),
        ("views:\n  global_scale:\n  - 4e-1\n  - 1\n", "views.global_scale", [0.4, 1.0]),
        (
            "a: &a [0.1, 0.2]".replace("a: ", "views: {global_scale: ") + ", local_scale: *a}",
            "views.local_scale",
            [0.1, 0.2],
        ),
    ],
)
def test_value_in_a_file(tmp_path, text, key, value):
    group, name = key.split(".")
    got = getattr(getattr(load_config(write(tmp_path / "x.yaml", text)), group), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["", "\n# only a remark\n", "optim:\n  # lr: 1\n", "{}", "null", "optim: {}"])
def test_empty_file_means_defaults(tmp_path, text):
    assert load_config(write(tmp_path / "x.yaml", text)) == PretrainConfig()


def test_overrides_from_python(tmp_path):
    config = load_config(None, {"optim": {"lr": 1e-3, "betas": (0.8, 0.9)}, "run.output": tmp_path, "data.root": None})
    assert (config.optim.lr, config.optim.betas, config.run.output) == (1e-3, [0.8, 0.9], str(tmp_path))
    assert error_of(load_config, None, {"optim": {"lrr": 1}}) == "unknown key 'optim.lrr'. Did you mean 'optim.lr'?"
    assert error_of(load_config, None, {"optim.lr": "fast"}) == "optim.lr: expected float (at least 0), got 'fast'"


def test_defaults_are_not_shared_between_configs():
    first = load_config()
    first.views.global_scale.append(9.0)
    assert load_config().views.global_scale == PretrainConfig().views.global_scale == [0.4, 1.0]


@pytest.mark.parametrize("config", [PretrainConfig(), KNNConfig("c"), AttentionConfig("c", "i"), DemoConfig()])
def test_dump_reads_back(tmp_path, config):
    assert load_config(write(tmp_path / "c.yaml", dump_config(config)), cls=type(config)) == config


@pytest.mark.parametrize(
    "text", ["", "a b", "1", "1e-3", "no", "null", "[a]", "{a: b}", "a: b", "# x", "ü", "'q'", "-", "a\nb", "*"]
)
def test_dump_keeps_odd_text_and_numbers(tmp_path, text):
    config = PretrainConfig()
    config.run.name, config.optim.lr, config.optim.min_lr, config.optim.clip = text, 1 / 3 * 1e-9, 0.0, 1e22
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config


BETAS = "expected list of float (2 of them, at least 0, below 1), got"
SCALE = "expected list of float (2 of them, least first, 0 to 1), got"

# Mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim:\n  learning_rate: 1", ":2: unknown key 'optim.learning_rate'. Did you mean 'optim.lr'?"),
        ("optim:\n  clip: 1\n  lrr: 1", ":3: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("optimizer:\n  lr: 1", ":2: unknown key 'optimizer.lr'. Did you mean 'optim.lr'?"),
        ("epochs: 3", ":1: unknown key 'epochs'. Did you mean 'trainer.max_epochs'?"),
        ("batch_size: 3", ":1: unknown key 'batch_size'. Did you mean 'data.batch_size'?"),
        ("trainer: {lr: 3}", ":1: unknown key 'trainer.lr'. Did you mean 'optim.lr'?"),
        ("optim: {lr: {peak: 1}}", ":1: unknown key 'optim.lr.peak'"),
        ("optim:\n  lr: fast", ":2: optim.lr: expected float (at least 0), got 'fast'"),
        ("optim:\n  lr:", ":2: optim.lr: expected float (at least 0), got nothing"),
        ("optim:\n  lr: [1]", ":2: optim.lr: expected float (at least 0), got ['1']"),
        ("optim: {lr: .nan}", ":1: optim.lr: expected float (at least 0), got '.nan'"),
        ("optim: {lr: .inf}", ":1: optim.lr: expected float (at least 0), got '.inf'"),
        ("optim: {betas: 0.9}", f":1: optim.betas: {BETAS} '0.9'"),
        (
            "optim: {betas: [0.9, x]}",
            f":1: optim.betas: {BETAS} 'x'",
        ),
        (
            "optim: {betas: [0.9, {a: 1}]}",
            f":1: optim.betas: {BETAS} {{}}",
        ),
        ("optim: 3", ":1: optim: is a group of options such as optim.lr, not a value"),
        ("optim: [lr]", ":1: optim: is a group of options such as optim.lr, not a value"),
        ("trainer: {max_epochs: 1.5}", ":1: trainer.max_epochs: expected int (at least 1), got '1.5'"),
        (
            "trainer: {accelerator: gqu}",
            ":1: trainer.accelerator: expected one of auto, cpu, gpu, got 'gqu'. Did you mean 'gpu'?",
        ),
        (
            "method: {queue: 3, name: dno}",
            ":1: method.name: expected one of dino, dinov2, mae, sit, supervised, got 'dno'. Did you mean 'dino'?",
        ),
        ("optim:\n  lr: 1\n  lr: 2", ":3: key 'optim.lr' stands twice"),
        ("optim: {lr: 1}\noptim: {clip: 1}", ":2: key 'optim' stands twice"),
        ("optim: {lr: 1}\noptim.lr: 2", ":2: key 'optim.lr' stands twice"),
        ("optim: {lr: 1", ":1: not valid YAML: "),
        ("optim:\n\tlr: 1", ":2: not valid YAML: "),
        ("a: 1\n--- \nb: 1", ":2: not valid YAML: "),
        ("- optim", ": expected options as 'key: value' lines, got a sequence"),
        ("optim", ": expected options as 'key: value' lines, got a scalar"),
        ("? [a]\n: 1", ":1: expected a key, got a sequence"),
        ("a: &x\n  b: *x", "nested too deep"),
        ("1: x", ":1: unknown key '1'"),
    ],
)
def test_mistake_in_a_file(tmp_path, text, message):
    file = write(tmp_path / "x.yaml", text)
    said = error_of(load_config, file)
    assert said.startswith(f"{file}{message}") or (message in said and said.startswith(str(file)))
    assert "\n" not in said and len(said) - len(str(file)) < 220


@pytest.mark.parametrize(
    "words, message",
    [
        ("--optim.lrr 3", "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("--lr 3", "unknown option '--lr'. Did you mean '--optim.lr'?"),
        ("--dataa.root x", "unknown option '--dataa.root'. Did you mean '--data.root'?"),
        ("--zzz", "unknown option '--zzz'. Known: --method, --backbone,"),
        ("--optim.lr fast", "--optim.lr: expected float (at least 0), got 'fast'"),
        ("--optim.lr", "--optim.lr: expected float (at least 0), got nothing"),
        ("--optim.lr nan", "--optim.lr: expected float (at least 0), got 'nan'"),
        ("--optim.lr -1", "--optim.lr: expected float (at least 0), got '-1'"),
        ("--optim.lr 1 2", "unexpected argument '2' after --optim.lr 1"),
        ("--optim 3", "--optim: is a group of options such as optim.lr, not a value"),
        ("--trainer.max_epochs 0", "--trainer.max_epochs: expected int (at least 1), got '0'"),
        ("--views.flip 1.5", "--views.flip: expected float (0 to 1), got '1.5'"),
        (
            "--views.global_scale 0.4",
            f"--views.global_scale: {SCALE} ['0.4']",
        ),
        ("--method.student_temperature 0", "--method.student_temperature: expected float (at least 0.001), got '0'"),
        ("--run.overwrite maybe", "--run.overwrite: expected true or false, got 'maybe'"),
        ("--data.workers aut", "--data.workers: expected int or auto (at least 0), got 'aut'. Did you mean 'auto'?"),
        (
            "--trainer.precision fp16",
            "--trainer.precision: expected one of auto, bf16, fp32, got 'fp16'. Did you mean 'bf16'?",
        ),
        ("nonsense", "unexpected argument 'nonsense'"),
        ("-lr 3", "unexpected argument '-lr'"),
        ("--config", "--config: expected a YAML file, got nothing"),
    ],
)
def test_mistake_on_the_command_line(words, message):
    assert error_of(load_config, None, words.split()).startswith(message)


def test_config_file_that_cannot_be_read(tmp_path):
    write(tmp_path / "smoke.yaml", "")
    assert error_of(load_config, tmp_path) == f"{tmp_path}: is a folder, expected a YAML file"
    assert (
        error_of(load_config, tmp_path / "smok.yaml")
        == f"{tmp_path}/smok.yaml: no such config file. Did you mean 'smoke.yaml'?"
    )
    assert error_of(load_config, tmp_path / "no" / "x.yaml") == f"{tmp_path}/no/x.yaml: no such config file."
    (tmp_path / "b.yaml").write_bytes(bytes(range(256)))
    assert error_of(load_config, tmp_path / "b.yaml") == f"{tmp_path}/b.yaml: not valid YAML: not a text file"


def test_missing_required_option_and_wrong_item_of_a_list():
    assert error_of(load_config, cls=KNNConfig) == "missing required option --checkpoint"
    assert error_of(load_config, cls=AttentionConfig) == "missing required option --checkpoint"
    words = "--checkpoint c --images i --formats overlay maskk".split()
    known = "png, overlay, mask, labels, pca, npz, coco, gif, mp4"
    expected = f"--formats: expected any of {known}, got 'maskk'. Did you mean 'mask'?"
    assert error_of(load_config, None, words, AttentionConfig) == expected
    assert load_config(None, "--checkpoint c --k 10 20".split(), KNNConfig).k == [10, 20]
    assert load_config(None, "--checkpoint c --k [10,20]".split(), KNNConfig).k == [10, 20]
    assert "expected list of int (at least 1), got '0'" in error_of(
        load_config, None, "--checkpoint c --k 5 0".split(), KNNConfig
    )


@pytest.mark.parametrize("method", METHODS)
def test_names_of_other_programs_lead_to_options_that_exist(method):
    schema = Schema(PretrainConfig, {"method.name": method})
    assert set(schema.synonyms.values()) <= set(schema.options)
    assert schema.suggest("embed_dim") == " Did you mean 'backbone.dim'?"


def test_a_method_has_the_names_of_its_own_code():
    words = ["--method.name", "sit", "--method.drop_perc", "0.5"]
    assert "Did you mean '--method.drop_area'?" in error_of(load_config, None, words)
    assert "drop_area" not in error_of(load_config, None, ["--method.drop_perc", "0.5"])


def test_an_empty_mapping_is_a_section_and_no_value(tmp_path):
    assert load_config(write(tmp_path / "a.yaml", "optim: {}\n")) == load_config(None, {"optim": {}}) == load_config()
    said = error_of(load_config, write(tmp_path / "b.yaml", "optim:\n  lr: {}\n"))
    assert "optim.lr: expected float" in said and said.endswith("got {}")
    assert "optim.lr: expected float" in error_of(load_config, None, {"optim": {"lr": {}}})


CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_dumps(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config
