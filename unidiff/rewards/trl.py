"""Reward functions written for TRL's GRPOTrainer, used unchanged.

Such a function is called with `prompts, completions, completion_ids, trainer_state, log_extra, log_metric` and the
columns of its data set, all by keyword, and returns a list of floats or Nones, or a coroutine of one (documentation of
TRL 1.10, "Using a custom reward function"). unidiff passes only the arguments that the signature names, so a function
without **kwargs need not name them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from unidiff.config import typed
from unidiff.rewards.call import accepted
from unidiff.rewards.reward import Reward, name_of, reward
from unidiff.rewards.segment_view import SequenceView


@dataclass(eq=False)
class TRLFunction:
    """Wraps a TRL-style function in unidiff's signature.

    Prompts and completions contain only the texts, joined by line breaks, as TRL functions do not take pictures.
    completion_ids:  lists of the ids of all sampled segments, including pictures.
    trainer_state:   a `transformers.TrainerState` with the run's global_step and max_steps; epoch stays 0.
    log_metric(name, value), log_extra(column, values): see `Log`.
    chat: pass completions and prompts as chat messages, [{"role": …, "content": …}].
    """

    function: Callable[..., Any]
    chat: bool = False

    @property
    def asynchronous(self) -> bool:
        """Whether the wrapped function is async, so that a call returns its coroutine."""
        return Reward(self.function, "trl").asynchronous

    def __call__(
        self, segments: list[SequenceView], trainer_state: Any, log_extra: Any, log_metric: Any, **columns: list
    ) -> Any:
        prompts = [[part for part in view.prompt if not isinstance(part, Image.Image)] for view in segments]
        own = {
            "prompts": [self._message("user", "\n".join(map(str, parts))) for parts in prompts],
            "completions": [self._message("assistant", "\n".join(view.texts)) for view in segments],
            "completion_ids": [[i for s in view.segments for i in s.tokens.tolist()] for view in segments],
            "trainer_state": trainer_state,
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        columns = {key: values for key, values in columns.items() if key not in ("prompt", "completion")}
        return self.function(**accepted(self.function, {**columns, **own}))

    def _message(self, role: str, content: str) -> str | list[dict[str, str]]:
        return [{"role": role, "content": content}] if self.chat else content


@typed
def from_trl(
    function: Callable[..., Any],
    *,
    credit: str | Iterable[str] = "text",
    chat: bool = False,
    name: str | None = None,
    **options: Any,
) -> Reward:
    """A reward on whole responses from a TRL-style function; see `TRLFunction`. options: as in `reward`."""
    return reward(TRLFunction(function, chat), on="sequence", credit=credit, name=name or name_of(function), **options)
