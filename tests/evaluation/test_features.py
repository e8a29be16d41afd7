from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_suite import distributed
from vit_suite.data.decode import DecodeError
from vit_suite.errors import UserError
from vit_suite.evaluation.features import FeatureOptions, extract_features, frozen, moved, raw_pixel_features
from vit_suite.views.evaluate import eval_view

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


class Source:
    """Random images; those at `bad` do not decode."""

    name, split, quarantine = "toy", "train", None

    def __init__(self, count=11, size=(8, 8), bad=(), labels=True, resident=False, ragged=False):
        generator = torch.Generator().manual_seed(0)
        sizes = [(size[0] + 4 * (i % 3), size[1] + 2 * (i % 2)) if ragged else size for i in range(count)]
        self.pictures = [torch.randint(0, 256, (3, *s), generator=generator, dtype=torch.uint8) for s in sizes]
        self.bad = set(bad)
        self.labels = torch.arange(count) % 4 if labels else None
        if resident:
            self.images = torch.stack(self.pictures)

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        if index in self.bad:
            raise DecodeError(f"{index}.jpg", "truncated")
        return self.pictures[index]


class Net(nn.Module):
    """Linear in the pixels, so that features can be checked by hand; dropout and BatchNorm tell whether eval mode was
    on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3 * 8 * 8, 5)
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.dropout(self.norm(self.linear(images.flatten(1))))


def expected(net, pictures):
    with torch.no_grad(), frozen(net):
        return nn.functional.normalize(net(eval_view(pictures, 8, MEAN, STD)), dim=1)


@pytest.mark.parametrize("options", [{}, {"count": 75}, {"resident": True}, {"ragged": True}, {"count": 1}])
def test_features_equal_the_model_on_the_evaluation_view(options):
    source, net = Source(**options), Net().train()
    net.norm.eval()
    result = extract_features(net, source, 8, MEAN, STD, options=FeatureOptions(batch_size=4, precision="fp32"))
    torch.testing.assert_close(result.features, expected(net, source.pictures))
    assert result.labels.equal(source.labels) and result.indices.tolist() == list(range(len(source)))
    assert result.features.dtype == torch.float32 and not result.features.requires_grad
    assert net.training and net.dropout.training and not net.norm.training
    features, labels = result[:2]
    assert len(features) == len(labels)


def test_undecodable_images_are_dropped_with_their_labels():
    source, net = Source(bad=[0, 5, 10]), Net()
    result = extract_features(net, source, 8, MEAN, STD, options=FeatureOptions(batch_size=2, precision="fp32"))
    good = [i for i in range(11) if i not in (0, 5, 10)]
    assert result.indices.tolist() == good
    assert [failure.path for failure in result.failures] == ["0.jpg", "5.jpg", "10.jpg"]
    assert result.labels.equal(source.labels[good])
    torch.testing.assert_close(result.features, expected(net, [source.pictures[i] for i in good]))


def test_failures_reach_the_quarantine_once():
    class Quarantine:
        calls = []

        def report(self, failures, what, total):
            self.calls.append((len(failures), what, total))

    source = Source(bad=[1, 7])
    source.quarantine = Quarantine()
    extract_features(Net(), source, 8, MEAN, STD, options=FeatureOptions(batch_size=3))
    assert Quarantine.calls == [(2, "toy", 11)]


def test_nothing_to_score_is_the_users_error():
    with pytest.raises(UserError, match="no images"):
        extract_features(Net(), Source(count=0), 8, MEAN, STD)
    with pytest.raises(UserError, match="none of the 3 images of toy decodes.*0.jpg: truncated"):
        extract_features(Net(), Source(count=3, bad=range(3)), 8, MEAN, STD)


def test_unlabeled_images_have_label_minus_one():
    assert extract_features(Net(), Source(labels=False), 8, MEAN, STD).labels.tolist() == [-1] * 11


def test_modes_come_back_after_an_error():
    net = Net().train()
    with pytest.raises(RuntimeError):
        extract_features(net, Source(), 4, MEAN, STD)  # the linear layer takes 8x8
    assert net.training and net.dropout.training


def test_bf16_is_close_and_comes_back_as_float32():
    source, net = Source(), Net()
    exact = extract_features(net, source, 8, MEAN, STD, options=FeatureOptions(precision="fp32")).features
    rough = extract_features(net, source, 8, MEAN, STD, options=FeatureOptions(precision="bf16")).features
    assert rough.dtype == torch.float32 and not rough.equal(exact)
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0)


def test_raw_pixels():
    source = Source(count=5)
    result = raw_pixel_features(source, 8, MEAN, STD, options=FeatureOptions(batch_size=2))
    pixels = (torch.stack(source.pictures) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(result.features, nn.functional.normalize(pixels.flatten(1), dim=1))


def test_joining_batches_copies_no_list(monkeypatch):
    """`indices = indices + found` copied all earlier numbers at every batch: 87 s at ImageNet's size."""

    class Watched(list):
        copied = 0

        def __radd__(self, other):
            Watched.copied += len(other)
            return Watched([*other, *self])

    monkeypatch.setattr(distributed, "gather_objects", lambda part: [(Watched(part[0]), part[1], Watched(part[2]))])
    result = extract_features(Net(), Source(count=40, bad={3}), 8, MEAN, STD, options=FeatureOptions(batch_size=1))
    assert result.indices.tolist() == [i for i in range(40) if i != 3] and Watched.copied == 0


def test_a_bank_lies_on_a_gpu_that_has_room_for_it(monkeypatch):
    """In half of what is free there: 125 numbers of 1,000 bytes."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: ("sent", device))
    large = torch.zeros(126)
    assert moved(large[:125], gpu) == ("sent", gpu) and moved(large, gpu) is large
