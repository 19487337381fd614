"""PeakMemory: bytes that are alive at once, by hand."""

from __future__ import annotations

import torch

from unidiff.memory import PeakMemory

KIB = torch.ones(256)  # float32: 1,024 bytes


def test_what_is_alive_at_once_counts():
    with PeakMemory() as memory:
        a = KIB + 1
        b = a * 2
        del a
        c = b - 1  # takes the place of a
    assert memory.peak == 2048 and memory.alive == 2048
    del b, c
    assert memory.alive == 0


def test_views_and_what_was_there_before_do_not():
    weight = torch.ones(1000, 256)
    with PeakMemory() as memory:
        row = weight[3]
        again = row.view(16, 16).T.detach()
        own = again + 1
        part = own[:2]
    assert memory.peak == 1024 and part.shape == (2, 16)


def test_what_autograd_keeps_counts():
    weight = torch.ones(256, requires_grad=True)
    with PeakMemory() as memory:
        loss = (weight * KIB).exp().sum()  # the exponential is kept for the backward pass
        before = memory.alive
        loss.backward()
    assert before == 1024 + 4
    assert memory.peak >= before + 1024
