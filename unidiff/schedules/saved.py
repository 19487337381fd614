"""Saves a schedule in its model's folder, as schedule.json and schedule.safetensors, and loads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unidiff.files import read_json, write_json
from unidiff.schedules.schedule import SCHEDULES, Schedule

_ABOUT, _WEIGHTS = "schedule.json", "schedule.safetensors"


def save(schedule: Schedule | None, folder: Path) -> None:
    """Writes a schedule; None removes the files of an earlier one."""
    if schedule is None:
        for name in (_ABOUT, _WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    save_file({k: v.detach().cpu().contiguous() for k, v in schedule.state_dict().items()}, folder / _WEIGHTS)
    write_json(folder / _ABOUT, {"name": schedule.name, "options": schedule.options})


def load(folder: Path) -> Schedule | None:
    """The schedule of a model's folder, or None. Raises ValueError with the file's name if it is damaged, or if the
    schedule is not registered (a folder never imports code)."""
    about = folder / _ABOUT
    if not about.is_file():
        return None
    found = read_json(about)
    name, options = (found.get(k) for k in ("name", "options")) if isinstance(found, dict) else (None, None)
    if name not in SCHEDULES:
        raise ValueError(f"{about}: schedule {name!r} is not known; import the module that registers it first")
    try:
        schedule = SCHEDULES[name](**options)  # type: ignore[arg-type]
        schedule.load_state_dict(load_file(folder / _WEIGHTS))
    except (TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{about}: {' '.join(str(error).split())}") from error
    if not all(bool(torch.isfinite(p).all()) for p in schedule.parameters()):
        raise ValueError(f"{folder / _WEIGHTS}: it holds values that are not finite")
    return schedule.float()
