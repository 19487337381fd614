"""A schedule beside the model that it steers: schedule.json and schedule.safetensors in the model's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unidiff.files import read_json, write_json
from unidiff.schedules.schedule import SCHEDULES, Schedule

_ABOUT, _WEIGHTS = "schedule.json", "schedule.safetensors"


def save(schedule: Schedule | None, folder: Path) -> None:
    """Writes a schedule; None removes what an earlier model has left there."""
    if schedule is None:
        for name in (_ABOUT, _WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    save_file({k: v.detach().cpu().contiguous() for k, v in schedule.state_dict().items()}, folder / _WEIGHTS)
    write_json(folder / _ABOUT, {"name": schedule.name, "options": schedule.options})


def load(folder: Path) -> Schedule | None:
    """The schedule of a model's folder, None where there is none. Raises ValueError with the file if it is damaged, or
    if its name is not known here: a folder never imports anything."""
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
