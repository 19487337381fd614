"""Rewards by name: the registry, and conversion of names and functions to rewards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from unidiff import plugins
from unidiff.config import nearest
from unidiff.rewards.reward import Reward, name_of, parameters
from unidiff.rewards.trl import from_trl

REWARDS: dict[str, Reward] = {}
_SHIPPED = "unidiff.scorers"  # registers the rewards that ship; imported when a name is first needed


def register(name: str) -> Callable[[Reward], Reward]:
    """Decorator that registers a reward, so that configs can name it. Raises ValueError if the name is taken, or has a
    character that is reserved for lists of names with weights."""
    if not name or set(name) & set("=,: "):
        raise ValueError(f"a reward cannot be registered as {name!r}: a name has no '=', ',', ':' or space")

    def add(marked: Reward) -> Reward:
        importlib.import_module(_SHIPPED)
        if name in REWARDS:
            raise ValueError(f"a reward named {name!r} is registered already")
        REWARDS[name] = replace(as_reward(marked), name=name)
        return marked

    return add


def resolve(text: str, own: Iterable[Reward] = ()) -> Reward:
    """The reward that a config names: `name`, or `name=weight`, which replaces the reward's weight.

    The name is one of `own` (the task's rewards), a registered one, `package.module:function` or
    `package.module.function`.
    Raises ValueError for an unknown name (with the nearest known one), a module without that function, or a weight
    that is not a number.
    """
    importlib.import_module(_SHIPPED)
    name, equals, weight = (part.strip() for part in text.partition("="))
    known = {**REWARDS, **{one.name: one for one in own}}
    found = known[name] if name in known else _imported(name, known)
    if not equals:
        return found
    try:
        return replace(found, weight=float(weight))
    except ValueError as error:
        raise ValueError(f"reward {text!r}: the weight {weight!r} is not a finite number") from error


def _imported(name: str, known: Iterable[str]) -> Reward:
    if not plugins.is_path(name):
        hint = nearest(name, known) or f"; known: {', '.join(sorted(known))}."
        raise ValueError(f"unknown reward {name!r}{hint} A function is named as package.module:function")
    try:
        return _marked(plugins.imported(name, lambda found: isinstance(found, Reward)))
    except (ValueError, TypeError) as error:
        raise type(error)(f"reward {name!r}: {error}") from error


def as_reward(given: Any, own: Iterable[Reward] = ()) -> Reward:
    """A Reward from a Reward, a name, or an unmarked TRL-style function (one with a `completions` or `completion_ids`
    parameter). own: further rewards that can be named, besides the registered ones."""
    if isinstance(given, str):
        return resolve(given, own)
    return _marked(given)


def _marked(given: Any) -> Reward:
    """A Reward from a Reward or a TRL-style function; names are not accepted."""
    if isinstance(given, Reward):
        return given
    if callable(given) and {"completions", "completion_ids"} & parameters(given).keys():
        return from_trl(given)
    if getattr(given, "__annotations__", {}).get("return") in (Reward, "Reward"):
        raise TypeError(f"{name_of(given)} makes a reward: write my_reward = {name_of(given)}(…), and name that")
    raise TypeError(f"{repr(given)[:80]} is not a reward: mark the function with @reward(on='text'|'image'|'sequence')")


def as_rewards(given: Iterable[Any], own: Iterable[Reward] = ()) -> list[Reward]:
    """Converts all to Rewards. Raises ValueError if two share a name, because metrics and faults are keyed by name."""
    if isinstance(given, str):
        given = [part for part in given.split(",") if part.strip()]
    own = list(own)
    rewards = [as_reward(one, own) for one in given]
    names = [one.name for one in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rewards are named {twice[0]!r}; give one another name: reward(..., name='…')")
    return rewards
