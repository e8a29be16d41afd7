"""The backbone that comes along is made of the first blocks of a run."""

import json
import sys
from pathlib import Path

import torch

from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone
from vit_suite.weights import checkpoint
from vit_suite.weights.checkpoint import load_backbone, save_backbone


def test_the_first_blocks_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import make_builtin

    torch.manual_seed(0)
    run, package = tmp_path / "run", tmp_path / "package"
    run.mkdir()
    whole = Backbone(BackboneConfig(name="vit", patch_size=8, dim=24, depth=3, heads=3, image_size=[16, 16]))
    save_backbone(whole, run, [0.5] * 3, [0.25] * 3, method="supervised")
    (run / "config.yaml").write_text("run: {seed: 0, output: /home/me/run}\n")
    monkeypatch.setattr(checkpoint, "BUILTIN_FOLDER", package)
    monkeypatch.setattr(make_builtin, "BUILTIN_FOLDER", package)
    monkeypatch.setattr(make_builtin, "IMAGES", 60)
    monkeypatch.setattr(make_builtin, "TESTS", 20)
    words = [str(run), "--name", "small", "--blocks", "2", "--command", "vit-suite pretrain", "--note", "a CPU"]
    monkeypatch.setattr(sys, "argv", ["make_builtin.py", *words])
    make_builtin.main()

    short, image = load_backbone("builtin:small"), torch.randn(2, 3, 16, 16)
    _, before, after = whole.eval().blocks(*whole.embed(image))
    torch.testing.assert_close(short.backbone(image), whole.vit.norm(before)[:, 0])
    assert not torch.allclose(short.backbone(image), whole.vit.norm(after)[:, 0])
    about = json.loads((package / "small.json").read_text())
    assert about["sha256"] == short.sha256 and about["config"] == {"run": {"seed": 0}}
    assert 0 < about["scores"]["knn"]["backbone"]["k20"]["top1"] < 100
    assert 0 < about["scores"]["masks"]["backbone"]["fixed head"]["jaccard"] < 100
