"""Which precision is picked, what is said about it, and how tensors go to a GPU."""

import pytest
import torch

from vit_suite import hardware


def test_what_goes_to_a_gpu_is_contiguous_when_it_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    values = torch.arange(6).view(2, 3).T
    sent = hardware.send(values, torch.device("cuda"))
    assert torch.equal(sent, values) and [host.is_contiguous() for host in pinned] == [True]


@pytest.mark.parametrize(
    ("asked", "device", "native", "picked", "words"),
    [
        ("auto", "cuda", True, "bf16", ""),
        ("auto", "cuda", False, "fp32", "this GPU does not multiply bf16"),
        ("auto", "cpu", False, "fp32", ""),
        ("bf16", "cpu", False, "bf16", "this CPU emulates bf16"),
        ("bf16", "cuda", True, "bf16", ""),
        ("fp32", "cuda", False, "fp32", ""),
    ],
)
def test_precision_is_what_the_hardware_multiplies(asked, device, native, picked, words, monkeypatch):
    said = []
    monkeypatch.setattr(hardware, "native_bf16", lambda device: native)
    monkeypatch.setattr(hardware.log, "warning", lambda message, *values: said.append(message % values))
    assert hardware.pick_precision(asked, torch.device(device)) == picked
    assert len(said) == bool(words) and all(line.startswith(words) for line in said)


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(hardware.distributed, "local_rank", lambda: 6)
    assert hardware.own_gpu(torch.device("cuda")) == torch.device("cuda", 2)
    assert hardware.own_gpu(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert hardware.own_gpu(torch.device("cpu")) == torch.device("cpu")
