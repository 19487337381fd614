"""dUltra's schedule: a Bernoulli draw for each masked token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unidiff.schedules.schedule import Choice, Look, Schedule, Uniform, register_schedule

_FEATURES = 6


@register_schedule("planner")
class Planner(Schedule):
    """Each masked token is committed with its own probability u. A small network computes u from the token's confidence
    and entropy, progress, the share masked and the modality. If no token is drawn, the likeliest one is committed.

    A step's log-probability is Σ log u over the drawn tokens plus Σ log(1 − u) over the other masked tokens. The
    log-probability of the tokens' values belongs to the model, and is trained by its estimator.

    share: initial u of every token. hidden: width of the network. Source: dUltra (arXiv 2512.21446) and learned
    unmasking policies (arXiv 2512.09106). Their heads read hidden states; ours reads only output distributions.
    """

    def __init__(self, share: float = 0.25, hidden: int = 32) -> None:
        if not 0 < share < 1:
            raise ValueError(f"schedule planner: share is {share}; it must be in (0, 1)")
        if hidden < 1:
            raise ValueError(f"schedule planner: hidden is {hidden}; it must be at least 1")
        super().__init__()
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)))
        self.network = nn.Sequential(nn.Linear(_FEATURES - 1, hidden), nn.Tanh(), last)

    def features(self, look: Look) -> Tensor:
        """[b, N · 6]: for each token whether it is masked, and five features."""
        sure = look.sure.clamp(1e-6, 1 - 1e-6)
        each = look.progress[:, None].expand_as(sure), look.left[:, None].expand_as(sure)
        kind = torch.full_like(sure, float(look.modality))
        return torch.stack([look.masked.float(), sure.logit() / 4, look.entropy / 4, *each, kind], 2).flatten(1)

    def _log_odds(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[b, N] each: whether a token is masked, and the log-odds of committing it."""
        tokens = features.unflatten(1, (-1, _FEATURES))
        return tokens[..., 0], self.network(tokens[..., 1:])[..., 0]

    def draw(self, features: Tensor, uniform: Uniform | None) -> Tensor:
        masked, odds = self._log_odds(features)
        level = 0.5 if uniform is None else uniform(odds.shape[1])
        return (torch.sigmoid(odds).double() > level).float() * masked

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
        masked, odds = self._log_odds(features)
        signed = torch.where(action > 0, odds, -odds)
        return (nn.functional.logsigmoid(signed) * masked).sum(1)

    def choice(self, look: Look, action: Tensor) -> Choice:
        return Choice(commit=action > 0)
