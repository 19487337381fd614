"""The interface of schedules: a small policy that steers each step of a rollout.

The settings of a sampler are the same for every prompt and every step. A schedule looks at what the model says in a
step and decides, for each rollout, how warm the tokens are drawn and which of them stay, or how many. What it saw and
did is kept with the rollout, so that it can be trained by the same rewards as the model: its log-probability is that
of its actions.

    @register_schedule("mine")
    class Mine(Schedule):
        def features(self, look): ...           # [b, F] what it decides by
        def draw(self, features, uniform): ...  # [b, A] an action; uniform None = the likeliest one
        def log_prob(self, features, action): ...  # [b], differentiable
        def choice(self, look, action): ...     # what the action means

Dimensions: b rows at work in a step, N tokens of the block or picture, V values.
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

Uniform = Callable[[int], Tensor]  # n -> float64 [b, n] in (0, 1): functions of each row's key and of the step

SCHEDULES: dict[str, type[Schedule]] = {}
_S = TypeVar("_S", bound="type[Schedule]")


@dataclass(frozen=True)
class Look:
    """What a schedule sees in a step, before anything is drawn.

    modality: of the segment. progress: float32 [b], steps taken over the most that there can be, 0 in the first.
    masked: bool [b, N]. total: int64 [b], the tokens of the block or picture: N, or less where other rows have more.
    log_probs: float32 [b, N, V], at the settings' temperature.
    """

    modality: Modality
    progress: Tensor
    masked: Tensor
    total: Tensor
    log_probs: Tensor

    @cached_property
    def sure(self) -> Tensor:
        """float32 [b, N]: the probability of the likeliest value, 0 where nothing is masked."""
        return self.log_probs.amax(2).exp() * self.masked

    @cached_property
    def entropy(self) -> Tensor:
        """float32 [b, N] in nats, 0 where nothing is masked."""
        return torch.special.entr(self.log_probs.exp()).sum(2) * self.masked

    @property
    def left(self) -> Tensor:
        """float32 [b]: the share of the tokens that are still masked."""
        return self.masked.sum(1) / self.total

    def quantiles(self, *levels: float) -> Tensor:
        """float32 [b, levels]: of `sure` over the masked tokens."""
        ordered = self.sure.masked_fill(~self.masked, torch.inf).sort(1).values
        last = (self.masked.sum(1, keepdim=True) - 1).clamp(min=0)
        places = (last * torch.tensor(levels, device=last.device)).round().long()
        return ordered.gather(1, places).nan_to_num(posinf=1.0)


@dataclass(frozen=True)
class Choice:
    """What a step does; None = what the settings say.

    temperature: float [b], above 0, times the settings' temperature. commit: bool [b, N], the tokens to commit, of
    which those that may be are; count: int64 [b], how many, the likeliest first; bound: float [b], see
    `text_entropy_bound`. At most one of these three. At least one token is committed in any case.
    """

    temperature: Tensor | None = None
    commit: Tensor | None = None
    count: Tensor | None = None
    bound: Tensor | None = None

    @property
    def commits(self) -> bool:
        """Whether it says which tokens are committed, or how many."""
        return not (self.commit is None and self.count is None and self.bound is None)


@dataclass(frozen=True)
class Choices:
    """What a schedule saw and did in the T steps of a segment.

    features: float32 [T, F]. action: float32 [T, A]. log_prob: float32 [T], when it was drawn. committed: int64 [T].
    temperature: float32 [T], the factor. fresh: bool [T], False where an earlier action was repeated: such a step has
    log-probability 0.
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
    """Base of all schedules; see the module. It is small and stays in float32. Where it does not steer a modality, the
    settings hold."""

    name: ClassVar[str] = ""
    once: ClassVar[bool] = False  # it acts in a segment's first step, and that action is repeated
    options: dict[str, Any]  # how it was made, defaults included

    def __new__(cls, *args: Any, **options: Any) -> Schedule:
        made = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind_partial(made, *args, **options)
        given.apply_defaults()
        object.__setattr__(made, "options", {k: v for k, v in given.arguments.items() if k in _known(cls)})
        return made

    def steers(self, modality: Modality) -> bool:
        """Whether it decides anything in segments of this modality."""
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
        """What actions mean in a step."""
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
    """The options of a class, and their defaults."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(schedule.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in several}


def make_schedule(text: str, seed: int = 0) -> Schedule:
    """A schedule as a setting names it: "controls", with options "controls:temperature=no", or one of a module, which
    is imported: "package.module:name". Options are keyword arguments of its class with a default.

    seed: of its first parameters; the global generator is left as it was. Raises ValueError for a name or an option
    that is not known, and for an option of another type.
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
