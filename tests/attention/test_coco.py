from __future__ import annotations

import numpy as np
import pytest

from vit_suite.attention.coco import annotation, compressed, runs, write_coco

mask_api = pytest.importorskip("pycocotools.mask")
coco_api = pytest.importorskip("pycocotools.coco")

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")
RANDOM = np.random.default_rng(0)
MASKS = {
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "one": np.ones((1, 1), bool),
    "noise": RANDOM.random((31, 17)) > 0.5,
    "blocks": np.kron(RANDOM.random((6, 9)) > 0.6, np.ones((40, 30))).astype(bool),
    "long": np.repeat(RANDOM.random((1, 40)) > 0.5, 3000, axis=0),  # runs of thousands, and their differences
}


@pytest.mark.parametrize("name", MASKS)
def test_the_code_is_pycocotools(name):
    mask = MASKS[name]
    expected = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = annotation(mask)
    assert found["segmentation"] == {"size": expected["size"], "counts": expected["counts"].decode()}
    assert (mask_api.decode(found["segmentation"]) == mask).all()
    assert found["area"] == mask_api.area(expected) and found["bbox"] == mask_api.toBbox(expected).tolist()


def test_runs_start_with_zeros():
    assert runs(np.array([[False, True], [True, True]])).tolist() == [1, 3]
    assert runs(np.array([[True, False]])).tolist() == [0, 1, 1]
    assert compressed(np.array([1, 3])) == "13"


def test_a_file_that_pycocotools_reads(tmp_path, capsys):
    pictures = [
        ({"id": 3, "file_name": "a.jpg", "height": 31, "width": 17}, [{"head": "0"} | annotation(MASKS["noise"])]),
        (
            {"id": 7, "file_name": "ü/b.jpg", "height": 5, "width": 7},
            [{"head": str(i)} | annotation(MASKS["full"]) for i in range(2)],
        ),
    ]
    write_coco(tmp_path / "coco.json", {"threshold": 0.6}, lambda: iter(pictures))
    coco = coco_api.COCO(str(tmp_path / "coco.json"))
    assert coco.getImgIds() == [3, 7] and coco.loadImgs([7])[0]["file_name"] == "ü/b.jpg"
    assert coco.getCatIds() == [1] and coco.getAnnIds() == [1, 2, 3]
    (first,) = coco.loadAnns(coco.getAnnIds(imgIds=[3]))
    assert (coco.annToMask(first) == MASKS["noise"]).all() and first["head"] == "0"
    assert [one["head"] for one in coco.loadAnns(coco.getAnnIds(imgIds=[7]))] == ["0", "1"]
