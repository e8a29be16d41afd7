"""The page on a run: what it says, that names cannot break it, and what it does in a real browser without a network."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.commands.conftest import tiny_run, words  # noqa: F401 (a fixture)
from tests.reports.browser import CHROMIUM, Browser
from vit_suite import cli
from vit_suite.errors import UserError
from vit_suite.parsing import dump_config, load_config
from vit_suite.reports.about import fingerprint
from vit_suite.reports.embedding import neighbours, principal_axes
from vit_suite.reports.report import baseline_note, in_short, write_comparison, write_report
from vit_suite.reports.run_files import RunFiles, differences

HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")


def make_run(folder, name="a", lr=1e-3, steps=40, **files):
    """A run directory without a backbone, as a training that was stopped leaves it."""
    folder.mkdir(parents=True)
    config = load_config(None, {"optim.lr": lr, "run.name": name, "data.name": "shapes"})
    (folder / "config.yaml").write_text(dump_config(config))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss", "knn/top1", HOSTILE])
        for step in range(steps):
            writer.writerow([step // 10, step, 5 / (step + 1), 30 + step if step % 10 == 9 else "", "nan"])
    entry = {
        "task": "knn",
        "metrics": {"top1": {"20": 41.5}},
        "protocol": {"data": HOSTILE, "k": [20]},
        "sha256": "0" * 64,
        "command": f"vit-suite knn --checkpoint '{HOSTILE}'",
        "time": "2026-01-01T00:00:00Z",
    }
    (folder / "results.json").write_text(json.dumps([entry]))
    status = {"state": "stopped", "step": 40, "max_steps": 80, "images_per_second": 123.0, "reason": "SIGUSR1"}
    (folder / "status.json").write_text(json.dumps(status))
    for path, content in files.items():
        (folder / path).write_text(content)
    return folder


def test_what_a_run_directory_says(tmp_path):
    run = RunFiles(make_run(tmp_path / "a"))
    assert run.last("knn/top1") == 69 and run.best("knn/top1") == 69 and run.last("train/loss") == pytest.approx(0.125)
    assert HOSTILE not in run.metrics, "a column without a number"
    assert run.options["optim.lr"] == 1e-3 and run.name == "a"
    with pytest.raises(UserError, match="no such run directory"):
        RunFiles(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="holds no config.yaml"):
        RunFiles(tmp_path / "c")


def test_a_report_holds_scores_protocol_and_the_difference_from_the_recipe(tmp_path):
    text = write_report(make_run(tmp_path / "a", lr=7e-3)).read_text()
    assert "stopped at step 40 of 80: SIGUSR1" in text and '<td>top1.20</td><td class="n">41.5</td>' in text
    assert re.search(r"<td>optim.lr</td><td>0.007</td><td>0.0005</td>", text)
    assert "<td>optim.min_lr</td>" not in text, "only what differs"


def test_hostile_names_stay_text(tmp_path):
    """Names in results, metrics and titles are escaped: none of them ends a script or opens a tag."""
    run = make_run(tmp_path / "a", name=HOSTILE)
    text = write_report(run).read_text()
    assert HOSTILE not in text and "<img src=x" not in text and "&lt;script&gt;" in text


def test_a_comparison_shows_what_differs(tmp_path):
    runs = [make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", lr=2e-3)]
    entries = json.loads((runs[1] / "results.json").read_text())
    (runs[1] / "results.json").write_text(json.dumps(entries * 2))
    text = write_comparison(runs, tmp_path / "out.html").read_text()
    assert re.search(r"<td>optim.lr</td><td class=\"n\">0.001</td><td class=\"n\">0.002</td>", text)
    assert "<td>optim.min_lr</td>" not in text and text.count("stopped at step 40 of 80") == 2
    assert '<td>knn: top1.20</td><td class="n">41.5</td><td class="n">41.5</td>' in text, "a row a score"
    assert text.count("knn [2]: top1.20") == 1, "scored again"


def test_the_command_of_the_baselines_reads_the_data_of_the_run(tmp_path):
    run = RunFiles(make_run(tmp_path / "a"))
    run.folder, run.results = Path("runs/a"), []
    run.options |= {"data.name": "folder", "data.root": "my photos", "data.holdout": 0.2}
    command = "knn --checkpoint runs/a --data.name folder --data.root 'my photos' --data.holdout 0.2 --baselines"
    assert html.escape(command) in baseline_note(run)


def test_a_fine_tuned_run_says_its_steps(tmp_path):
    run = RunFiles(make_run(tmp_path / "a"))
    run.results.append({"task": "finetune", "metrics": {"steps": 1200, "images": 9600}})
    found = in_short(run)
    assert found["optimizer steps"] == "1,200" and found["images seen"] == "9,600"


def test_a_run_has_one_color_in_all_charts_of_a_comparison():
    pytest.importorskip("bokeh")
    from vit_suite.reports.curves import curve

    series = [(0.0, 1.0), (1.0, 2.0)]

    def drawn(runs):
        plot = curve("train/psnr", runs, ["a", "b"])
        return {item.label.value: item.renderers[0].glyph.line_color for item in plot.legend[0].items}

    both, alone = drawn({"a": series, "b": series}), drawn({"b": series})
    assert both["a"] != both["b"] == alone["b"] and list(alone) == ["b"], "named even where it is the only one"


def test_the_axis_of_a_constant_curve_has_its_size():
    pytest.importorskip("bokeh")
    from vit_suite.reports.curves import curve

    for value, span in ((0.04, 0.008), (0.0, 1.0), (float("nan"), 1.0)):
        assert curve("train/weight_decay", {"a": [(0.0, value), (9.0, value)]}, ["a"]).y_range.default_span == span


def test_no_address_is_fetched(tmp_path):
    text = write_report(make_run(tmp_path / "a")).read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", text)


def test_broken_files_of_a_killed_run_are_left_out(tmp_path):
    run = make_run(tmp_path / "a", **{"about.json": "{", "status.json": ""})
    assert "no status" in write_report(run).read_text()


def test_bad_words_answer_in_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    for line in ([], [tmp_path / "none"], [run, run], [run, "--output", tmp_path]):
        assert cli.main(["report", *map(str, line)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_principal_axes_are_those_of_a_known_cloud():
    generator = np.random.default_rng(0)
    axes, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    cloud = (generator.standard_normal((400, 2)) * [5.0, 2.0]) @ axes[:2]
    places, explained = principal_axes(cloud.astype(np.float32))
    assert explained == pytest.approx(1, abs=1e-6)
    assert np.allclose(np.abs(np.cov(places.T)), np.diag(np.linalg.eigvalsh(np.cov(cloud.T))[::-1][:2]), atol=1e-3)
    again, _ = principal_axes(cloud.astype(np.float32)[:, ::1].copy())
    assert np.array_equal(places, again)


def test_neighbours_are_the_nearest_others():
    angles = np.deg2rad([0.0, 1.0, 90.0, 92.0, 180.0])
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert neighbours(features, queries=5, count=1) == [(0, [1]), (1, [0]), (2, [3]), (3, [2]), (4, [3])]


def test_a_fingerprint_follows_files_and_labels_but_not_their_place(tmp_path):
    from vit_suite.config import DataConfig
    from vit_suite.data.module import ImageDataModule

    def at(root, classes):
        for split in ("train", "test"):
            for name in classes:
                (tmp_path / root / split / name).mkdir(parents=True)
                for index in range(2):
                    Image.new("RGB", (16, 16)).save(tmp_path / root / split / name / f"{index}.png")
        cfg = DataConfig(name="folder", root=str(tmp_path / root), batch_size=2)
        return fingerprint(ImageDataModule(cfg).train_source)

    assert at("one", "ab") == at("two", "ab") != at("three", "ac")


def test_differences_name_what_only_one_side_has():
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [("a", 1, None), ("b", 2, 3), ("c", None, 4)]


def test_a_training_ends_with_a_report_and_says_where_it_comes_from(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["/bin/vit-suite", "pretrain", "--data.name", "two words"])
    assert cli.main(["pretrain", *words(run__output=folder, run__report=True, trainer__max_epochs=1)]) == 0
    about = RunFiles(folder).about
    assert about["data"]["images"] == 64 and re.fullmatch("[0-9a-f]{16}", about["data"]["fingerprint"])
    assert about["versions"]["torch"] and about["machine"]["processes"] == 1 and about["machine"]["cores"]
    assert about["command"] == "vit-suite pretrain --data.name 'two words'"
    text = (folder / "report.html").read_text()
    assert about["data"]["fingerprint"] in text and "Map of test images" in text and "t-SNE" not in text
    assert "done at step 4 of 4" in text and ", colored by class" in text


def test_a_report_that_fails_does_not_fail_the_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vit_suite.training.run.write_report", lambda *_, **__: 1 / 0)
    folder = tmp_path / "run"
    assert cli.main(["pretrain", *words(run__output=folder, run__report=True, trainer__max_epochs=1)]) == 0
    assert RunFiles(folder).status["state"] == "done" and "no report (division by zero)" in caplog.text


@needs_browser
def test_the_page_in_a_browser(tiny_run, tmp_path):  # noqa: F811
    """Charts are drawn, the map shows its images, nothing complains and nothing is fetched."""
    page = write_report(tiny_run, tmp_path / "report.html", images=30)
    run = RunFiles(tiny_run)
    with Browser((1120, 900)) as browser:
        browser.open(page)
        roots = "[...Bokeh.documents[0].roots()]"
        browser.wait("window.Bokeh && Bokeh.documents.length > 0")
        assert browser.run(f"{roots}.length") == len(run.metrics) + 2, "a chart a metric, PCA and t-SNE"
        assert set(run.metrics) <= set(browser.run(f"{roots}.map(root => root.title.text)"))
        glyphs = f"{roots}.find(root => root.title.text.startsWith('PCA')).renderers[0].data_source.data"
        assert browser.run(f"{glyphs}.picture.length") == 30
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.run("window.broken") is None
        fetched = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        addresses = {e["params"]["request"]["url"].split(":")[0] for e in fetched}
        assert addresses <= {"file", "data", "blob"}, addresses
        assert browser.complaints() == []


@needs_browser
def test_hostile_names_in_a_browser(tmp_path):
    page = write_report(make_run(tmp_path / "a", name=HOSTILE))
    with Browser() as browser:
        browser.open(page)
        browser.wait("window.Bokeh && Bokeh.documents.length > 0")
        assert browser.run("window.broken") is None
        assert HOSTILE.split("<")[0] in browser.run("document.querySelector('h1').textContent")
        assert yaml.safe_dump({"data": HOSTILE}).strip()[:20] in browser.run("document.body.textContent")
