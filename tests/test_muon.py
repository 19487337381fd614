"""Muon: the step is orthogonal, scaled by shape, the same for a matrix alone and in a stack."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.tables import each
from unidiff.muon import Muon, orthogonalised

SHAPES = [(16, 16), (48, 16), (16, 48), (1, 8), (8, 1)]


def gradients(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@each(("shape", "scale"), itertools.product(SHAPES, [1e-3, 1.0, 1e3]))
def test_update_is_nearly_orthogonal(shape: tuple[int, int], scale: float) -> None:
    g = gradients(4, *shape) * scale
    update = orthogonalised(g)
    assert update.shape == g.shape
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    # The singular vectors stay, the values are pushed to 0.7 … 1.2 (those that are not tiny: 5 steps reach 1/300).
    inner = u.mT @ update @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    large = s > 0.02 * s.norm(dim=1, keepdim=True)
    assert values[large].min() > 0.65 and values[large].max() < 1.25


def test_a_matrix_moves_alike_alone_and_among_others() -> None:
    g = gradients(5, 12, 7).double()  # in which nothing but order tells the sums of both apart
    torch.testing.assert_close(orthogonalised(g)[3], orthogonalised(g[3:4])[0], rtol=0, atol=1e-12)


@each("shape", SHAPES)
def test_step_is_nesterov_momentum_scaled_by_shape(shape: tuple[int, int]) -> None:
    weights = [nn.Parameter(gradients(1, *shape, seed=9)[0]) for _ in range(2)]
    reference = [w.detach().clone() for w in weights]
    optimizer, momentum = Muon(weights, lr=0.1, momentum=0.9), [torch.zeros(shape) for _ in weights]
    for step in range(3):
        for i, w in enumerate(weights):
            w.grad = gradients(1, *shape, seed=10 * step + i)[0]
            momentum[i] = 0.9 * momentum[i] + 0.1 * w.grad
            update = orthogonalised((0.1 * w.grad + 0.9 * momentum[i])[None])[0]
            reference[i] -= 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5 * update
        optimizer.step()
    for w, expected in zip(weights, reference):
        torch.testing.assert_close(w.detach(), expected, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_decoupled() -> None:
    plain, decayed = (nn.Parameter(gradients(1, 4, 6)[0]) for _ in range(2))
    start = plain.detach().clone()
    for weight, decay in ((plain, 0.0), (decayed, 0.5)):
        weight.grad = gradients(1, 4, 6, seed=1)[0]
        Muon([weight], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(plain - decayed, 0.1 * 0.5 * start)


def test_parameters_without_gradient_stay() -> None:
    moved, still = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moved.grad = torch.eye(3)
    Muon([moved, still]).step()
    assert not torch.equal(moved, torch.ones(3, 3)) and torch.equal(still, torch.ones(3, 3))


@each("shape", [(3,), (2, 3, 4), ()])
def test_only_matrices_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"matrices, got a parameter of shape"):
        Muon([nn.Parameter(torch.zeros(shape))])


def test_momentum_survives_saving() -> None:
    def run(resume: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer = Muon([weight], lr=0.1)
        for step in range(4):
            if resume and step == 2:
                state = optimizer.state_dict()
                optimizer = Muon([weight], lr=0.1)
                optimizer.load_state_dict(state)
            weight.grad = gradients(1, 4, 6, seed=step)[0]
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(False), run(True))
