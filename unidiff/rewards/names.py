"""Rewards by name: the registry, and what a config or a user may give as a reward."""

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
    """Decorator that makes a reward known to configs by name. ValueError if the name is taken, or holds a character
    that a list of names with weights needs."""
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
    """The reward that a config names: `name`, or `name=weight`, which replaces the weight that it was marked with.

    The name is that of one of `own` (those of the task), a registered one, or `package.module:function` (with a point
    for the colon, too).
    Errors: ValueError for an unknown name (with the nearest known one), a module without that function, or a weight
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
    """A Reward from a Reward, a name, or an unmarked function with a `completions` or `completion_ids` parameter (TRL
    style). own: rewards whose names are known beside the registered ones."""
    if isinstance(given, str):
        return resolve(given, own)
    return _marked(given)


def _marked(given: Any) -> Reward:
    """A Reward from a Reward or a function; a name is not taken."""
    if isinstance(given, Reward):
        return given
    if callable(given) and {"completions", "completion_ids"} & parameters(given).keys():
        return from_trl(given)
    if getattr(given, "__annotations__", {}).get("return") in (Reward, "Reward"):
        raise TypeError(f"{name_of(given)} makes a reward: write my_reward = {name_of(given)}(…), and name that")
    raise TypeError(f"{repr(given)[:80]} is not a reward: mark the function with @reward(on='text'|'image'|'sequence')")


def as_rewards(given: Iterable[Any], own: Iterable[Reward] = ()) -> list[Reward]:
    """All of them as Rewards. ValueError if two share a name, since metrics and faults go by name."""
    if isinstance(given, str):
        given = [part for part in given.split(",") if part.strip()]
    own = list(own)
    rewards = [as_reward(one, own) for one in given]
    names = [one.name for one in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two rewards are named {twice[0]!r}; give one another name: reward(..., name='…')")
    return rewards
