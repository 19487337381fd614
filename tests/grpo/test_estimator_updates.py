"""What one update does, for every estimator and loss, on a two-layer toy in float64: gradients and probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unidiff import noise
from unidiff.canvas import Canvas, render
from unidiff.estimators import ESTIMATORS, Draw, Estimator, draw_views, make, parse, values_of
from unidiff.grpo.experience import credited
from unidiff.grpo.losses import LOSSES, Denominators, modality_loss
from unidiff.rewards.routed import Routed
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec

SPEC = ModelSpec(
    family="toy", mask=0, pad=1, bos=2, text_end=(3, 4), image_next=4, image_begin=(5,), image_end=(6,),
    text_range=(3, 12), image_offset=12, codebook_size=5, logit_rows=17, image_grid=(2, 3), text_length=6,
    max_positions=64,
)  # fmt: skip
GROUP, PROMPTS = 4, 2
ADVANTAGE = torch.tensor([1.5, -0.5, -1.0, 0.3, 0.8, -1.2, 0.4, 0.0])


class Toy(nn.Module):
    """Two layers of attention over everything, without positions beyond those of the row; in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(gain * values / shape[-1] ** 0.5)

        width, inner = 32, 48  # enough that different rollouts have gradients of their own
        self.words, self.places = matrix(17, width, gain=3.0), matrix(64, width, gain=2.0)
        self.head = matrix(17, width, gain=2.0)
        self.mix = nn.ParameterList([matrix(3, width, width) for _ in range(2)])
        self.wide = nn.ParameterList([matrix(inner, width) for _ in range(2)])
        self.narrow = nn.ParameterList([matrix(width, inner) for _ in range(2)])

    def forward(
        self, canvas: Canvas, mask: Tensor, hide: Tensor | None = None, temperature: Any = (1, 1), guidance: Any = None
    ) -> Tensor:
        hidden_ids = mask if hide is None else mask | hide
        ids = canvas.ids.masked_fill(hidden_ids, SPEC.mask)
        x = self.words[ids] + self.places[: ids.shape[1]]
        for mix, wide, narrow in zip(self.mix, self.wide, self.narrow):
            query, key, value = (x @ m for m in mix)
            weight = (
                (query @ key.mT / x.shape[-1] ** 0.5).masked_fill(~canvas.clean.valid[:, None], -torch.inf).softmax(-1)
            )
            x = x + weight @ value
            x = x + torch.tanh(x @ wide.T) @ narrow.T
        out = torch.zeros(mask.shape, dtype=torch.float64)
        for modality in Modality:
            low, high = SPEC.range_of(modality)
            logp = (x @ self.head[low:high].T / temperature[modality]).log_softmax(-1)
            own = mask & (canvas.modality == modality)
            target = (canvas.ids - low).clamp(0, high - low - 1)
            out = torch.where(own, logp.gather(2, target[..., None])[..., 0], out)
        return out


def rollouts() -> Canvas:
    """Two groups of four responses: a text and a picture, with step maps."""
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    rows = []
    for i in range(GROUP * PROMPTS):
        n = 3 + i % 3
        words = torch.cat([draw(5, 12, n), torch.tensor([4])])
        text = Segment(Modality.TEXT, words, step=draw(0, 3, n + 1).int())  # type: ignore[arg-type]
        image = Segment(Modality.IMAGE, draw(12, 17, 6), grid=(2, 3), step=draw(0, 3, 6).int())  # type: ignore[arg-type]
        rows.append(Interleaved([Segment(Modality.TEXT, draw(5, 12, 3), prompt=True), text, image]))
    return render(rows, SPEC)


CANVAS = rollouts()
KEYS = torch.tensor([noise.key(7, i) for i in range(GROUP * PROMPTS)])


def advantages(method: Estimator) -> Tensor:
    """[B, L], as the trainer spreads them."""
    modality = torch.tensor([[Modality.TEXT, Modality.IMAGE]]).expand(len(ADVANTAGE), 2)
    plain = ADVANTAGE[:, None].expand(modality.shape)
    groups = torch.arange(len(ADVANTAGE)) // GROUP
    routed = Routed(groups, plain, torch.ones_like(plain, dtype=torch.bool), {})
    given = credited(routed, modality, method, method)
    return given.gather(1, (CANVAS.segment - 1).clamp(min=0)) * CANVAS.sampled


def loss_of(new: Tensor, old: Tensor, draw: Draw, method: Estimator, loss_type: str, **options) -> Tensor:
    aggregation, level = LOSSES[loss_type]
    counts = {m: Denominators.of(draw.weight * (CANVAS.modality == m), 6) for m in Modality}
    loss, _ = modality_loss(
        new, old, advantages(method), draw.weight, CANVAS.modality, loss_type=aggregation, level=level,
        denominators=counts, weights={Modality.TEXT: 1.0, Modality.IMAGE: 0.7},
        without_ratio=() if method.ratio else tuple(Modality), **options,
    )  # fmt: skip
    return loss


def log_probs(policy: Toy, draw: Draw) -> Tensor:
    """[K, B, L], view by view."""
    return torch.stack([policy(CANVAS, view.mask, view.hide) for view in draw.views])


def values(policy: Toy, draw: Draw, method: Estimator) -> Tensor:
    return values_of(CANVAS, draw, log_probs(policy, draw), method, method, advantages(method))


def chained_gradient(
    policy: Toy, old: Tensor, draw: Draw, method: Estimator, loss_type: str, **options
) -> list[Tensor]:
    """As the trainer finds it: through the log-probabilities, view by view."""
    with torch.no_grad():
        logp_KBL = log_probs(policy, draw)
    logp_KBL.requires_grad_()
    value = values_of(CANVAS, draw, logp_KBL, method, method, advantages(method))
    (outer,) = torch.autograd.grad(loss_of(value, old, draw, method, loss_type, **options), logp_KBL)
    policy.zero_grad()
    for view, gradient in zip(draw.views, outer):
        (policy(CANVAS, view.mask, view.hide) * gradient).sum().backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", [*ESTIMATORS, "trace:merge=2", "elbo:samples=3:antithetic=no", "spg:block=2:power=2"])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    """Of every loss, with an old policy and a reference that differ from the policy, so that ratios, clipping and KL
    have a say."""
    method, policy, other = parse(name), Toy(0), Toy(0)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    draw = draw_views(CANVAS, method, method, 2, KEYS)[1]
    with torch.no_grad():
        old = values(other, draw, method)
    options = {"delta": 3.0, "beta": 0.05, "logp_ref_BL": old}

    def values_beside(way: list[Tensor], h: float) -> Tensor:
        """Of the policy, so far along this way."""
        with torch.no_grad():
            for p, w in zip(policy.parameters(), way):
                p += h * w
            found = values(policy, draw, method)
            for p, w in zip(policy.parameters(), way):
                p -= h * w
        return found

    gradients = {loss: chained_gradient(policy, old, draw, method, loss, **options) for loss in LOSSES}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in policy.parameters()]
        ahead, behind = (values_beside(way, h) for h in (1e-6, -1e-6))
        for loss_type, gradient in gradients.items():
            expected = sum((g * w).sum().item() for g, w in zip(gradient, way))
            change = [loss_of(new, old, draw, method, loss_type, **options).item() for new in (ahead, behind)]
            assert abs(expected) > 1e-3, loss_type
            assert (change[0] - change[1]) / 2e-6 == pytest.approx(expected, rel=2e-5, abs=1e-6), loss_type


# Each estimator with each modality; at an old policy that is the new one losses differ in their weights alone, so each
# loss comes with some of them.
UPDATES = [(name, m, list(LOSSES)[(2 * i + m) % len(LOSSES)]) for i, name in enumerate(ESTIMATORS) for m in Modality]


@pytest.mark.parametrize(("name", "modality", "loss_type"), UPDATES)
def test_an_update_raises_rewarded_rollouts_and_lowers_the_others(
    name: str, modality: Modality, loss_type: str
) -> None:
    """Their exact probability, which is that of writing them from left to right, in the modality that is trained.

    Rollouts share weights, so with both signs at once one may carry another along: the sum over advantages must rise.
    """
    method, oracle = make(name), make("left_to_right")
    (draw,), (every,) = (draw_views(CANVAS, m, m, 1, KEYS) for m in (method, oracle))
    own = (CANVAS.modality == modality) & CANVAS.sampled

    def change(rows: Tensor) -> Tensor:
        """[B] of the log-probabilities, by an update with these rollouts."""
        policy, part = Toy(1), Draw(draw.views, draw.weight * own * rows[:, None], draw.counts)

        def log_probability() -> Tensor:
            with torch.no_grad():
                return (values(policy, every, oracle) * own).sum(1)

        before = log_probability()
        with torch.no_grad():
            old = values(policy, part, method)
        gradient = chained_gradient(policy, old, part, method, loss_type)
        norm = torch.stack([g.norm() for g in gradient]).norm()
        with torch.no_grad():
            for p, g in zip((p for p in policy.parameters() if p.grad is not None), gradient):
                p -= 1e-4 * g / norm
        return log_probability() - before

    for sign in (1, -1)[: 1 if name == "weighted_elbo" else 2]:  # its weights are never negative
        rewarded = sign * ADVANTAGE > 0.2
        assert sign * float(change(rewarded)[rewarded].sum()) > 0
    assert float((change(torch.ones_like(ADVANTAGE)) * ADVANTAGE).sum()) > 0
