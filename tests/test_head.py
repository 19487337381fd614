"""Logits of half-precision heads: values against float64, gradients against the usual head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unidiff.head import float32_logits

WIDTH, WORDS = 512, 300
HALF = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def factors(*shape: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Hidden states and rows, whose logits have a standard deviation of 4."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*shape, WIDTH, generator=generator)
    rows = torch.randn(WORDS, WIDTH, generator=generator) * 4 / WIDTH**0.5
    return hidden.to(device, dtype).requires_grad_(), rows.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_logits_are_not_rounded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    hidden, rows = factors(*shape, dtype=dtype, device=device)
    out, exact = float32_logits(hidden, rows), nn.functional.linear(hidden.double(), rows.double())
    assert out.dtype == torch.float32 and out.shape == exact.shape
    assert torch.allclose(out.double(), exact, rtol=0, atol=2e-5)
    if out.numel():
        rounded = (nn.functional.linear(hidden, rows).double() - exact).abs().max()
        assert rounded > 50 * (out.double() - exact).abs().max()  # the usual head


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_the_usual_ones(dtype: torch.dtype, device: str) -> None:
    hidden, rows = factors(2, 5, dtype=dtype, device=device)
    grad = torch.randn(2, 5, WORDS, generator=torch.Generator().manual_seed(4)).to(device)
    own = torch.autograd.grad(float32_logits(hidden, rows), (hidden, rows), grad)
    usual = torch.autograd.grad(nn.functional.linear(hidden, rows).float(), (hidden, rows), grad)
    for a, b in zip(own, usual, strict=True):
        assert a.dtype == dtype and torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
    (alone,) = torch.autograd.grad(float32_logits(hidden, rows.detach()), hidden, grad)  # a frozen head
    assert torch.equal(alone, own[0])


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_rounds_the_factors_only(device: str) -> None:
    hidden, rows = factors(7, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = float32_logits(hidden, rows)
    assert torch.equal(out, float32_logits(hidden.bfloat16(), rows.bfloat16()))
    out.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32 and bool(hidden.grad.any())


def test_float32_is_the_plain_product() -> None:
    hidden, rows = factors(7, dtype=torch.float32)
    assert torch.equal(float32_logits(hidden, rows), nn.functional.linear(hidden, rows))
