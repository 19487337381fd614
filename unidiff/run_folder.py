"""A run's folder: its lock, settings, metrics and checkpoints.

    config.json                settings of the run
    run.lock                   locked by the process that writes here
    metrics.jsonl              one line per step
    checkpoints/step-000040/   a checkpoint; its progress.json holds the step, the settings and hashes of the files
    summary.json               results, at the end

A damaged checkpoint is moved aside, and the run resumes from the one before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from unidiff.config import convert, expanded
from unidiff.files import DRAFT, named, read_json, whole_folder, write_json, write_text

KEPT = 2  # checkpoints to keep
LOCK, PROGRESS, SUMMARY = "run.lock", "progress.json", "summary.json"


class Settings(Protocol):
    """A dataclass of settings. FREE: settings that a resumed run may change. GROWS: the one that it may increase."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    FREE: ClassVar[frozenset[str]]
    GROWS: ClassVar[str]

    @property
    def output_dir(self) -> str: ...

    @property
    def resume(self) -> bool: ...


class RunFolder:
    """The output directory of one run. settings, metrics: names of these files."""

    def __init__(self, path: str | Path, settings: str = "config.json", metrics: str = "metrics.jsonl") -> None:
        self.path = Path(path)
        self.settings_file, self.metrics = self.path / settings, self.path / metrics
        self._lock: _Lock | None = None

    # ---------------------------------------------------------------- claiming

    def open(self, config: Settings) -> None:
        """Claims the folder. Raises ValueError if it cannot be written, is in use, or contains another run or other
        files; with `resume`, if it contains no run, or one with other settings.

        A run that ended before its first step may be overwritten, so that a user can correct a setting.
        """
        self.check(config)
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock.of(self.path)
            self.check(config)  # again: another run may have used the folder meanwhile
            for draft in list(self.path.rglob(f"*{DRAFT}")):  # of a run that was killed
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
            if not config.resume:
                (self.path / "base.json").unlink(missing_ok=True)  # of a run that ended before its first step
            known = self.settings() if config.resume else {}
            write_json(self.settings_file, known | dataclasses.asdict(config))

    def check(self, config: Settings) -> None:
        """Raises what `open` would raise, except for a folder in use. Writes nothing."""
        with self._usable():
            self._check_place()
            if config.resume:
                self._check_same(config)
            elif self.begun:
                raise ValueError(
                    f"{self.path} holds another run; go on with it (--resume), choose another --output_dir or delete it"
                )
            elif around := next((p for p in self.path.absolute().parents if (p / LOCK).is_file()), None):
                raise ValueError(f"output_dir: {self.path} is inside the run {around}; choose a folder outside of it")
            elif self._settings_in_file() is None and (others := self._others()):
                raise ValueError(
                    f"output_dir: {self.path} holds {', '.join(others[:3])}{', …' if others[3:] else ''} but no run; "
                    "choose a folder that is empty or does not exist"
                )

    @property
    def begun(self) -> bool:
        """Whether a step or an evaluation has been completed here."""
        return bool(read_metrics(self.metrics) or self.checkpoints() or (self.path / SUMMARY).exists())

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return read_json(self.path / SUMMARY) is not None

    def settings(self) -> dict[str, Any]:
        """The settings of the run in this folder; if their file is damaged, those of its last checkpoint. Raises
        ValueError if there is no run."""
        if (found := self._settings_in_file()) is not None:
            return found
        for folder in reversed(self.checkpoints()):
            progress = read_json(folder / PROGRESS)
            if isinstance(progress, dict) and isinstance(found := progress.get("settings"), dict):
                fault = "damaged" if self.settings_file.exists() else "missing"
                warnings.warn(f"{self.settings_file} is {fault}; the settings are those in {folder}", stacklevel=2)
                return found
        if self.begun:
            raise ValueError(f"{self.settings_file} is missing or damaged; put back what the run wrote")
        there = "holds no run" if self.path.exists() else "does not exist"
        raise ValueError(f"output_dir: {self.path} {there}, so nothing can be resumed; to begin, leave out --resume")

    def changes(self, config: Settings) -> dict[str, tuple[Any, Any]]:
        """Settings that may not change, but differ between the folder's run and a config: {name: (before, now)}."""
        before, now = self.settings(), json.loads(json.dumps(dataclasses.asdict(config)))
        differ = {k: (before[k], v) for k, v in now.items() if k in before and before[k] != v and k not in config.FREE}
        return {k: (was, is_) for k, (was, is_) in differ.items() if k != config.GROWS or is_ < was}

    def _check_same(self, config: Settings) -> None:
        if changes := self.changes(config):
            was = ", ".join(f"{name} was {before!r}, is {now!r}" for name, (before, now) in changes.items())
            free = ", ".join(sorted(config.FREE - {"output_dir", "resume"}))
            raise ValueError(
                f"{self.path} cannot be resumed with other settings: {was} (what may change: {free}; "
                f"{config.GROWS} may grow)"
            )

    def _settings_in_file(self) -> dict[str, Any] | None:
        found = read_json(self.settings_file)  # a model's config.json names no output_dir
        return found if isinstance(found, dict) and "output_dir" in found else None

    def _others(self) -> list[str]:
        """Files in the folder, except hidden ones and those of a run that was killed before its settings were
        written."""
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        return [n for n in names if not n.startswith(".") and n not in (LOCK, self.settings_file.name + DRAFT)]

    def _check_place(self) -> None:
        for place in (self.path, *self.path.absolute().parents):
            if place.is_symlink() and not place.exists():
                raise ValueError(f"output_dir: {place} is a link to {place.readlink()}, which does not exist")
            if place.exists():
                if not place.is_dir():
                    raise ValueError(f"output_dir: {place} is a file, not a folder")
                if not os.access(place, os.W_OK | os.X_OK):
                    raise ValueError(f"output_dir: {place} cannot be written to")
                return

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"output_dir: {self.path} cannot be used: {error.strerror or error}") from error

    # ---------------------------------------------------------------- metrics and rollouts

    def rollouts(self, step: int) -> Path:
        """The file of the rollouts that a step was trained on; the first step is 1."""
        return self.path / "rollouts" / f"step-{step:06d}.safetensors"

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Metrics of the steps before `step`. Drops later lines, because these steps are repeated."""
        kept = [m for m in read_metrics(self.metrics) if m["step"] < step]
        write_text(self.metrics, "".join(json.dumps(m) + "\n" for m in kept))
        return kept

    def append(self, metrics: dict[str, Any]) -> None:
        """Appends a line of metrics. Raises WriteError."""
        with named(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    # ---------------------------------------------------------------- checkpoints

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first. Folders with other names, such as copies, are ignored."""
        return [folder for folder in self._numbered() if (folder / PROGRESS).is_file()]

    def _numbered(self) -> list[Path]:
        names = [re.fullmatch(r"step-(\d{6,18})", p.name) for p in self.path.glob("checkpoints/step-*")]
        steps = sorted({int(name[1]) for name in names if name})
        return [folder for step in steps if os.path.lexists(folder := self.checkpoint(step))]

    @contextlib.contextmanager
    def saving(self, step: int, **progress: Any) -> Iterator[Path]:
        """Yields a folder for a checkpoint. It becomes valid when the context ends; then old checkpoints are deleted.
        progress: further entries of its progress.json. Raises WriteError."""
        with whole_folder(self.checkpoint(step)) as draft:
            yield draft
            files = {p.relative_to(draft).as_posix(): _hash(p) for p in sorted(draft.rglob("*")) if p.is_file()}
            known = {"step": step, **progress, "settings": self._settings_in_file(), "files": files}
            write_json(draft / PROGRESS, known)
        for old in self.checkpoints()[:-KEPT]:
            shutil.rmtree(old)

    def last(self, limit: int) -> Path | None:
        """The last undamaged checkpoint, or None if none was written. Damaged ones are moved aside, with a warning.
        limit: steps of the run. Raises ValueError if all are damaged."""
        damaged: dict[Path, str] = {}
        for folder in reversed(self._numbered()):
            if (fault := _fault(folder, limit)) is None:
                for bad, why in damaged.items():
                    aside = _free(bad.with_name(f"{bad.name}.damaged"))
                    bad.rename(aside)
                    warnings.warn(f"{bad / why}; it is kept as {aside.name}, and {folder} goes on", stacklevel=2)
                return folder
            damaged[folder] = fault
        if damaged:
            raise ValueError(
                f"no checkpoint is whole: {'; '.join(str(bad / why) for bad, why in damaged.items())}. Put one back, "
                f"or delete {self.path / 'checkpoints'} to begin at step 0"
            )
        return None


def step_of(checkpoint: Path | None) -> int:
    """The number of steps before a checkpoint; 0 for None."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def _fault(folder: Path, limit: int) -> str | None:
    """A checkpoint's first fault: a file, and what is wrong with it; None if there is no fault."""
    progress = read_json(folder / PROGRESS)
    if not isinstance(progress, dict):
        return f"{PROGRESS} is {'damaged' if (folder / PROGRESS).exists() else 'missing'}"
    if progress.get("step") != step_of(folder) or step_of(folder) > limit:
        return f"{PROGRESS} says step {progress.get('step')!r} of {limit}"
    files = progress.get("files", {})
    if not isinstance(files, dict):
        return f"{PROGRESS} is damaged"
    for name, known in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _hash(folder / name) != known:
            return f"{name} is damaged"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free(path: Path) -> Path:
    """The path, with a number appended if it exists already."""
    return next(p for n in range(1_000_000) if not (p := path.with_name(path.name + f".{n}" * bool(n))).exists())


class _Lock:
    """A lock on a folder, released when this object or the process ends, even by a kill. A process has one lock per
    folder. Child processes do not inherit it, so an orphan does not block the folder."""

    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, Path], _Lock]] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        place = folder / LOCK
        self.file = place.open("a+")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(
                f"output_dir: {folder} is in use by {owner}; wait until it ends, or choose another --output_dir"
            ) from None
        except OSError as error:
            warnings.warn(f"{place} cannot be locked ({error.strerror}): start no second run here", stacklevel=2)
        weakref.finalize(self, self.file.close)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    @classmethod
    def of(cls, folder: Path) -> _Lock:
        """This process's lock on the folder. Raises ValueError if another process has it."""
        key, place = (os.getpid(), folder.resolve()), folder / LOCK
        lock = cls._held.get(key)
        if lock is None or not place.exists() or not os.path.samestat(os.fstat(lock.file.fileno()), place.stat()):
            lock = cls._held[key] = cls(folder)
        return lock


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl. Garbled lines are skipped with a warning; a garbled last line, which a kill may have
    truncated, without."""
    if not path.is_file():
        return []
    lines, out = path.read_text(encoding="utf-8", errors="replace").split("\n"), []
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError, RecursionError):
            metrics = json.loads(line)
            if isinstance(metrics, dict) and type(metrics.get("step")) is int and metrics["step"] >= 0:
                out.append(metrics)
                continue
        if any(lines[number:]) and line.strip():
            warnings.warn(f"{path}: line {number} is garbled and left out", stacklevel=2)
    return out


def resumed(config: type[Settings], settings: str = "config.json") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The `start` of `command_line.parse`: with `resume`, the settings of the run in `output_dir` are the defaults."""

    defaults = {f.name: f.default for f in dataclasses.fields(config)}

    def start(given: dict[str, Any]) -> dict[str, Any]:
        if not convert(given.get("resume", False), bool, "resume"):
            return {}
        folder = RunFolder(expanded(str({**defaults, **given}["output_dir"]), "output_dir"), settings)
        found = folder.settings()
        if unknown := sorted(found.keys() - defaults.keys()):
            some = ", ".join(unknown[:3]) + ", …" * (len(unknown) > 3)
            raise ValueError(f"{folder.settings_file} has {some}; it is the run of another program")
        return found

    return start
