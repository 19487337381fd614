"""Rows: any data set as a task."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from unidiff.rewards.names import as_reward, as_rewards
from unidiff.rewards.reward import Reward
from unidiff.rewards.table import reward_table
from unidiff.sequence import Locate, Writes, check_writes
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.prompt import Template, build, check_template, picture
from unidiff.tasks.sources import Source, column, read
from unidiff.tasks.task import Example, Responses, Task

if TYPE_CHECKING:
    from unidiff.model import UnifiedModel


@dataclass(frozen=True)
class Row(Example):
    """A row's example. folder: base of relative picture paths."""

    folder: Path = Path()


Rewards = Sequence[Reward | str | Callable[..., Any]]
_SHOWN = 3  # bad rows named in a message
_ENCODED = 32  # rows with pictures whose prompts are encoded to check their length


class Rows(Task):
    """A task made from the rows of a data set.

        Rows({"train": load_dataset("openai/gsm8k", "main", split="train"), "test": "test.jsonl"},
             prompt="{question}", writes="text", columns={"gold": lambda row: row["answer"].split("####")[1]},
             rewards=[numeric_answer(column="gold"), "format=0.5"])

    splits: rows by split, each a list of dicts, a `datasets.Dataset`, or a file (.jsonl, .json, .csv, .parquet). A
    single source is split: its last tenth becomes the test split.
    prompt: see `unidiff.tasks.prompt`. A row's own system prompt has priority over the task's.
    columns: further columns for rewards: name -> function of the row, or the (nested) name of a column.
    rewards: for all rows, or by kind. kind: the column with a row's kind.
    measure: held-out figures: name -> reward (its mean over the row). headline: the figures or rewards ("reward/name")
    that reports show first.
    region: for edits, the column with the editable area: a box [left, top, right, bottom] in pixels of the row's
    picture, or a mask picture of that size (white = editable); or a function (text, grid) -> [rows, columns] bool.
    response: the column with a correct response, for imitation and checks: a text, a picture, or a list.
    title: the column that names a row in reports.
    on_bad_row: "error", or "skip": bad rows are left out and listed in `skipped`.
    system, room, prepare: as in `Task`.

    Raises TypeError or ValueError for arguments that do not fit, FileNotFoundError and ImportError for files. Rows are
    validated by `check`, which a run calls first.
    """

    def __init__(
        self,
        splits: Mapping[str, Any] | Sequence[Any] | str | Path,
        prompt: Template = None,
        *,
        writes: Writes = "text",
        rewards: Rewards | Mapping[str, Rewards] = (),
        columns: Mapping[str, Callable[[Mapping[str, Any]], Any] | str] | None = None,
        measure: Mapping[str, Reward | str | Callable[..., Any]] | None = None,
        headline: Sequence[str] = (),
        kind: str | None = None,
        region: str | Locate | None = None,
        response: str | None = None,
        title: str | None = None,
        system: str | None = None,
        room: int | None = None,
        prepare: str | None = "default",
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}; choose error or skip")
        check_template(prompt)
        self.writes, self.system, self.room, self.prepare = check_writes(writes), system, room, prepare
        self.prompt, self.columns, self.on_bad_row = prompt, dict(columns or {}), on_bad_row
        self.kind = kind or ("kind" if isinstance(rewards, Mapping) else None)
        self.response, self.title = response, title
        self._find = region if callable(region) else None
        self._marked = None if callable(region) else region
        self._rewards = _by_kind(rewards)
        self._measured = {name: as_reward(one) for name, one in (measure or {}).items()}
        self.headline = tuple(headline) or tuple(self._measured) or ("reward",)
        self.sources = _parted(splits) if not isinstance(splits, Mapping) else _read(splits)
        self._good: dict[str, Sequence[int]] = {split: range(len(source)) for split, source in self.sources.items()}
        self.skipped: dict[str, list[str]] = {}
        self._checked = self._pictured = False

    # ---------------------------------------------------------------- examples

    def length(self, split: str) -> int:
        if split not in self.sources:
            raise ValueError(
                f"the task has no split {split!r}; it has {', '.join(self.sources)}. Give it one, or choose the split "
                "of evaluations by eval_split"
            )
        return len(self._good[split])

    def example(self, split: str, index: int) -> Example:
        if not 0 <= index < self.length(split):
            raise ValueError(f"index {index} of split {split!r}: it has {self.length(split)} rows")
        place = self._good[split][index]
        try:
            return self._made(self.sources[split], place)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(_told(self.sources[split], place, error)) from error

    def _made(self, source: Source, index: int) -> Example:
        row = source.row(index)
        parts, system = build(row, self.prompt, source.folder)
        if not any(part if isinstance(part, str) else True for part in parts):
            raise ValueError("the prompt is empty")
        columns = dict(row)
        for name, how in self.columns.items():
            columns[name] = how(row) if callable(how) else column(row, how)
        return Row(
            parts,
            columns,
            str(column(row, self.title)) if self.title else source.place(index),
            str(column(row, self.kind)) if self.kind else "",
            None if self._marked is None else self._region(column(row, self._marked), parts, source.folder),
            system,
            source.folder,
        )

    def _region(self, given: Any, parts: Sequence[Any], folder: Path) -> Image.Image | None:
        if given is None:
            return None
        shown = [part for part in parts if not isinstance(part, str)]
        if not shown:
            raise ValueError(f"column {self._marked!r}: the prompt has no picture to edit")
        size = shown[-1].size
        if isinstance(given, list | tuple) and all(isinstance(n, int | float) for n in given):
            left, top, right, bottom = (*given, *[0] * 4)[:4]
            if len(given) != 4 or not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
                raise ValueError(
                    f"column {self._marked!r}: {list(given)} is not a box of a picture of {size[0]} x {size[1]} "
                    "pixels; expected left, top, right, bottom"
                )
            mask = Image.new("L", size)
            mask.paste(255, (round(left), round(top), round(right), round(bottom)))
            return mask
        mask = picture(given, folder).convert("L")
        if mask.size != size:
            raise ValueError(f"column {self._marked!r}: a mask of {mask.size} for a picture of {size}")
        return mask

    # ---------------------------------------------------------------- checks

    def check(self) -> None:
        """Builds every example once. Raises ValueError with file, row, column and remedy; with on_bad_row="skip" it
        leaves bad rows out and warns of their number. A split whose rows are all in "train" is an error."""
        if self._checked:
            return
        self._sift(self._usable)
        self._check_splits()
        self._checked = True

    def fitted(self, model: UnifiedModel) -> Rows:
        """Checks that each prompt fits the model; bad rows are treated as in `check`. If prompts have pictures, only
        the first few rows of a split are checked, because encoding pictures is slow."""
        self.check()
        self._sift(
            lambda example: encode(model, self, ready(model, self, example)), _ENCODED if self._pictured else None
        )
        return self

    def _usable(self, example: Example) -> None:
        """Raises ValueError for an unusable example."""
        pictured = any(not isinstance(part, str) for part in example.prompt)
        self._pictured |= pictured
        if self.writes == "edit" and not pictured:
            raise ValueError("writes is 'edit', but the prompt has no picture to edit")
        if (known := self._kinds()) and example.kind not in known:
            raise ValueError(f"column {self.kind!r} is {example.kind!r}; rewards are given for {known}")

    def _sift(self, look: Callable[[Example], Any], most: int | None = None) -> None:
        """Calls `look` on the rows of every split, or on the first `most`. A row is bad if `look` raises."""
        for split, source in self.sources.items():
            good, bad = [], []
            looked_at = self._good[split][:most]
            for index in looked_at:
                try:
                    look(self._made(source, index))
                except (KeyError, TypeError, ValueError, OSError) as error:
                    bad.append(_told(source, index, error))
                    if self.on_bad_row == "error":
                        raise ValueError(
                            f"{bad[0]}. Mend the row, or leave bad rows out by on_bad_row='skip'"
                        ) from error
                else:
                    good.append(index)
            good += self._good[split][len(looked_at) :]
            if not good:
                raise ValueError(f"split {split!r}: no row of {source.name} can be used: {bad[0]}")
            if bad:
                self.skipped[split], self._good[split] = self.skipped.get(split, []) + bad, good
                shown = "\n  ".join(bad[:_SHOWN])
                warnings.warn(f"{len(bad)} bad rows of {source.name} are left out:\n  {shown}", stacklevel=3)

    def _kinds(self) -> list[str]:
        return sorted({one.kind for one in self._rewards if one.kind})

    def _check_splits(self) -> None:
        """Raises ValueError for a held-out split whose rows are all in the train split."""
        if "train" not in self.sources:
            return
        train = {repr(dict(self.sources["train"].row(i))) for i in self._good["train"]}
        for split, source in self.sources.items():
            if split != "train" and all(repr(dict(source.row(i))) in train for i in self._good[split]):
                raise ValueError(
                    f"split {split!r}: all of its rows are in 'train' too; held-out figures need other rows"
                )

    # ---------------------------------------------------------------- judging

    def rewards(self) -> list[Reward]:
        return list(self._rewards)

    def locate(self, example: Any) -> Locate | None:
        return self._find

    def measure(self, rows: Responses, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        if not self._measured:
            return {}
        table = reward_table(list(self._measured.values()), rows)
        return {name: table.row_means_BF[:, f].numpy() for f, name in enumerate(self._measured)}

    def best(self, example: Any) -> list[str | Image.Image] | None:
        """The response in the column `response`."""
        if self.response is None:
            return None
        given = column(example.columns, self.response)
        parts = given if isinstance(given, list | tuple) else [given]
        draws = self.writes in ("image", "edit")
        return [part if isinstance(part, str) and not draws else picture(part, example.folder) for part in parts]

    def demonstration(self, example: Any, attempt: int = 0) -> list[str | Image.Image] | None:
        return self.best(example)


def _by_kind(given: Rewards | Mapping[str, Rewards]) -> list[Reward]:
    if not isinstance(given, Mapping):
        return as_rewards(given)
    return as_rewards(
        dataclasses.replace(one, kind=kind, name=f"{kind}/{one.name}")
        for kind, rewards in given.items()
        for one in as_rewards(rewards)
    )


def _read(splits: Mapping[str, Any]) -> dict[str, Source]:
    if not splits:
        raise ValueError("splits is empty; give at least {'train': …}")
    for name, one in splits.items():
        for other, two in splits.items():
            same = one is two or (
                isinstance(one, str | Path) and isinstance(two, str | Path) and Path(one) == Path(two)
            )
            if name < other and same:
                raise ValueError(f"splits {name!r} and {other!r} are the same rows; held-out figures need other ones")
    return {name: read(given, name) for name, given in splits.items()}


def _parted(given: Any) -> dict[str, Source]:
    """Splits one source into train and test: the last tenth, at least one row, is held out."""
    source = read(given, "train")
    if len(source) < 2:
        raise ValueError(f"{source.name} has one row; a run needs others to be measured on")
    held = max(len(source) // 10, 1)
    rows = [source.rows[i] for i in range(len(source))]
    return {
        "train": Source(rows[:-held], source.name, source.folder),
        "test": Source(rows[-held:], f"{source.name} (its last {held} rows)", source.folder),
    }


def _told(source: Source, index: int, error: Exception) -> str:
    words = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{source.place(index)}: {words}"
