"""Detects rewards that score nothing. A run warns once, and its report repeats the warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from unidiff.rewards.table import RewardTable
from unidiff.sequence import Modality

logger = logging.getLogger(__name__)

_NOUN = {"text": "text", "image": "picture", "sequence": "response"}
_CHECK = {
    "image": "max_rounds (pictures at most), whether the model opens a picture at all (look at the texts of a rollout; "
    "recipes/supervised.py warms a model up), whether the task asks for pictures, and the reward's `on` and `credit`",
    "text": "whether the model writes a text at all (look at a rollout), and the reward's `on` and `credit`",
}


def idle_rewards(table: RewardTable) -> dict[str, list[str]]:
    """For each modality that no response of the table contains: the rewards that credit only this modality."""
    absent = {m.name.lower() for m in Modality if not bool((table.modality_BS == m).any())}
    credits = [{"text" if part == "last" else part for part in credit} for credit in table.credit]
    found = {
        modality: [name for name, credited in zip(table.names, credits) if credited == {modality}]
        for modality in sorted(absent)
    }
    return {modality: names for modality, names in found.items() if names}


class IdleWatch:
    """Warns once per run and modality if rewards score or credit nothing in a step."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, step: int, table: RewardTable) -> None:
        """step: from 0. table: all rollouts of the step."""
        for modality, names in idle_rewards(table).items():
            if modality not in self._told and len(table.modality_BS):
                self._told.add(modality)
                logger.warning(
                    "STEP %d: NONE OF THE %d RESPONSES CONTAINS A %s, so nothing is learnt from %s %s. Check %s.",
                    *(step + 1, len(table.modality_BS), _NOUN[modality].upper()),
                    *("rewards" if len(names) > 1 else "reward", ", ".join(map(repr, names)), _CHECK[modality]),
                )


def silent_rewards(metrics: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    """A sentence about each reward that had no value in a whole run. metrics: rows of a metrics.jsonl. kinds: each
    reward's `on`, by its name."""
    sentences = []
    for name, kind in kinds.items():
        if not metrics or any(f"reward/{name}" in row for row in metrics):
            continue
        lost = [row[f"lost/{name}"] for row in metrics if f"lost/{name}" in row]
        if not lost and kind in _CHECK:
            said = f"no response contains a {_NOUN[kind]}. Check {_CHECK[kind]}"
        elif any(lost):
            said = (
                f"{100 * sum(lost) / len(lost):.3g} % of its values were lost to faults. Read the warnings of the run"
            )
        else:
            said = "it always said that it does not apply (None)"
        steps = f"{len(metrics)} step{'s' * (len(metrics) != 1)}"
        sentences.append(f"Reward {name!r} gave no value in the run's {steps}: {said}.")
    return sentences
