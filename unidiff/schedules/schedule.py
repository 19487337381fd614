"""The interface of schedules: a small policy that steers each step of a rollout.

A sampler's settings are the same for every prompt and step. A schedule reads the model's distributions in a step and
chooses, for each rollout, the temperature, and which or how many tokens to commit. Its features and actions are stored
with the rollout, so that the model's rewards can train it too: the policy gradient uses the log-probability of its
actions.

    @register_schedule("mine")
    class Mine(Schedule):
        def features(self, look): ...           # [b, F] what it decides by
        def draw(self, features, uniform): ...  # [b, A] an action; uniform None = the likeliest one
        def log_prob(self, features, action): ...  # [b], differentiable
        def choice(self, look, action): ...     # what the action means

Dimensions: b rows active in a step, N tokens of the block or picture, V values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from unidiff import plugins
from unidiff.config import convert, nearest
from unidiff.sequence import Modality

Uniform = Callable[[int], Tensor]  # n -> float64 [b, n] in (0, 1), from each row's key and the step

SCHEDULES: dict[str, type[Schedule]] = {}
_S = TypeVar("_S", bound="type[Schedule]")


@dataclass(frozen=True)
class Look:
    """A schedule's input in a step, before tokens are drawn.

    modality: of the segment. progress: float32 [b], steps taken / maximum steps, 0 in the first step. masked: bool
    [b, N]. total: int64 [b], tokens of the row's block or picture, at most N. log_probs: float32 [b, N, V], at the
    settings' temperature.
    """

    modality: Modality
    progress: Tensor
    masked: Tensor
    total: Tensor
    log_probs: Tensor

    @cached_property
    def sure(self) -> Tensor:
        """float32 [b, N]: the probability of the likeliest value; 0 where not masked."""
        return self.log_probs.amax(2).exp() * self.masked

    @cached_property
    def entropy(self) -> Tensor:
        """float32 [b, N] in nats; 0 where not masked."""
        return torch.special.entr(self.log_probs.exp()).sum(2) * self.masked

    @property
    def left(self) -> Tensor:
        """float32 [b]: the share of tokens that are still masked."""
        return self.masked.sum(1) / self.total

    def quantiles(self, *levels: float) -> Tensor:
        """float32 [b, levels]: quantiles of `sure` over the masked tokens."""
        ordered = self.sure.masked_fill(~self.masked, torch.inf).sort(1).values
        last = (self.masked.sum(1, keepdim=True) - 1).clamp(min=0)
        places = (last * torch.tensor(levels, device=last.device)).round().long()
        return ordered.gather(1, places).nan_to_num(posinf=1.0)


@dataclass(frozen=True)
class Choice:
    """A schedule's choice for a step; None = follow the settings.

    temperature: float [b], above 0, a factor on the settings' temperature. At most one of the following: commit: bool
    [b, N], the tokens to commit, if they may be committed; count: int64 [b], how many to commit, likeliest first;
    bound: float [b], see `text_entropy_bound`. At least one token is always committed.
    """

    temperature: Tensor | None = None
    commit: Tensor | None = None
    count: Tensor | None = None
    bound: Tensor | None = None

    @property
    def commits(self) -> bool:
        """Whether it chooses the tokens to commit, or their number."""
        return not (self.commit is None and self.count is None and self.bound is None)


@dataclass(frozen=True)
class Choices:
    """A schedule's features and actions in the T steps of a segment.

    features: float32 [T, F]. action: float32 [T, A]. log_prob: float32 [T], when the action was drawn. committed: int64
    [T], tokens. temperature: float32 [T], the factor. fresh: bool [T], False = an earlier action was repeated; such a
    step has log-probability 0.
    """

    features: Tensor
    action: Tensor
    log_prob: Tensor
    committed: Tensor
    temperature: Tensor
    fresh: Tensor

    def __len__(self) -> int:
        return len(self.log_prob)


class Schedule(nn.Module):
    """Base of all schedules; see the module's docstring. Parameters stay in float32. A modality that it does not steer
    follows the settings."""

    name: ClassVar[str] = ""
    once: ClassVar[bool] = False  # True = one action per segment, in its first step, then repeated
    options: dict[str, Any]  # the constructor's arguments, including defaults

    def __new__(cls, *args: Any, **options: Any) -> Schedule:
        made = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind_partial(made, *args, **options)
        given.apply_defaults()
        object.__setattr__(made, "options", {k: v for k, v in given.arguments.items() if k in _known(cls)})
        return made

    def steers(self, modality: Modality) -> bool:
        """Whether it steers segments of this modality."""
        return True

    def features(self, look: Look) -> Tensor:
        """float32 [b, F]; without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define features")

    def draw(self, features: Tensor, uniform: Uniform | None) -> Tensor:
        """float32 [b, A]: an action for each row; uniform None = the likeliest one."""
        raise NotImplementedError(f"{type(self).__name__} must define draw")

    def log_prob(self, features: Tensor, action: Tensor) -> Tensor:
        """float32 [b]: the log-probability (or log-density) of actions; gradients flow to the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob")

    def choice(self, look: Look, action: Tensor) -> Choice:
        """Converts actions to a choice."""
        raise NotImplementedError(f"{type(self).__name__} must define choice")


def register_schedule(name: str) -> Callable[[_S], _S]:
    """Class decorator: adds a schedule to the registry. Raises TypeError for a class that is not a `Schedule`,
    ValueError for an impossible name."""

    def add(schedule: _S) -> _S:
        if not (isinstance(schedule, type) and issubclass(schedule, Schedule)):
            raise TypeError(f"schedule {name!r} must be a class derived from unidiff.schedules.Schedule")
        if not name or set(name) & set(".:="):
            raise ValueError(f"schedule {name!r}: a name has no . : or =")
        schedule.name = name
        SCHEDULES[name] = schedule
        return schedule

    return add


def _known(schedule: type[Schedule]) -> dict[str, Any]:
    """The options of a class, with their defaults."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(schedule.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in several}


def make_schedule(text: str, seed: int = 0) -> Schedule:
    """Makes a schedule from a setting: "controls", with options "controls:temperature=no", or "package.module:name",
    which imports the module. Options are the keyword arguments of its class that have a default.

    seed: of the initial parameters; the global generator does not change. Raises ValueError for an unknown name or
    option, and for an option of a wrong type.
    """
    name, *pairs = text.split(":")
    if pairs and "=" not in pairs[0] and name not in SCHEDULES:
        place = f"{name}:{pairs.pop(0)}"
        name = getattr(plugins.imported(place), "name", "")
        if not name:
            raise ValueError(f"{place} is not a registered schedule: write @register_schedule above its class")
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule {name!r} is not known{nearest(name, SCHEDULES) or '; known: ' + ', '.join(SCHEDULES)}"
        )
    known = _known(SCHEDULES[name])
    if wrong := [k for k, default in known.items() if not isinstance(default, (bool, int, float, str))]:
        raise ValueError(f"schedule {name!r}: its option {wrong[0]!r} needs a default that is a bool, number or text")
    options = {}
    for pair in pairs:
        option, _, value = pair.partition("=")
        if option not in known:
            raise ValueError(f"schedule {name!r} has no option {option!r}{nearest(option, known)}")
        options[option] = convert(value, type(known[option]), f"schedule {name}: {option}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            schedule = SCHEDULES[name](**options)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"schedule {name!r}: {error}") from error
    return schedule.float()
