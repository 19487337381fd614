"""Rollout files: the rollouts and rewards of one step, as a safetensors file.

    outputs/run/rollouts/step-000040.safetensors     the rollouts that the 40th step was trained on

Token columns are flat tensors over all segments in order. The structure (segments, stops, costs, settings, names of
rewards) is JSON in the file's metadata. A file contains no code, so files from strangers are safe to open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from unidiff.files import write_whole
from unidiff.model import UnifiedModel
from unidiff.rewards.routed import Routed
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.table import RewardTable
from unidiff.sampling.compute import Compute, Cost
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sequence import Interleaved, Modality, Segment

FORMAT, VERSION = "unidiff.rollouts", 1
_TABLE = "table."  # prefix of the reward table's tensors
# Optional per-token columns of a segment, with the stored dtype.
_COLUMNS = {"edited": torch.bool, "step": torch.int32, "probability": torch.float32, "warmth": torch.float32}


@dataclass
class RolloutBatch:
    """B rollouts with their rewards.

    titles: one per rollout. groups_B: int64, the group (prompt) of each rollout. figures: measures by name, one number
    per rollout, NaN where it does not apply. table, routed: rewards and advantages, for `table.explain(row, segment,
    routed)`, or None. router: the router's settings.
    fits: the `fingerprint` of the model; a checkpoint must match it to decode the rollouts. config: settings of the
    run. step: steps done when the file was written, None outside of a run.
    """

    rollouts: list[Rollout]
    titles: list[str]
    groups_B: Tensor
    fits: dict[str, Any]
    figures: dict[str, list[float]] = field(default_factory=dict)
    table: RewardTable | None = None
    routed: Routed | None = None
    router: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None

    def __len__(self) -> int:
        return len(self.rollouts)

    def check(self, model: UnifiedModel) -> None:
        """Raises ValueError, with the differences, if a model cannot decode these rollouts."""
        mine, theirs = self.fits, fingerprint(model)
        wrong = [
            f"{name} is {theirs['spec'].get(name)!r}, the rollouts have {value!r}"
            for name, value in mine["spec"].items()
            if name != "sampler" and theirs["spec"].get(name) != value
        ]
        wrong += [f"its {kind} tokenizer is another one" for kind in ("text", "image") if mine[kind] != theirs[kind]]
        if wrong:
            raise ValueError("the rollouts do not fit this checkpoint: " + "; ".join(wrong))


def fingerprint(model: UnifiedModel) -> dict[str, Any]:
    """The parts of a model that define the meaning of ids: the spec, and hashes of the text tokenizer's words and of
    the image tokenizer's weights. The policy's weights are not included: the model of step 60 opens rollouts of
    step 40."""
    words = json.dumps(sorted(model.tokenizer.get_vocab().items())).encode()
    weights = hashlib.sha256()
    if isinstance(model.images, nn.Module):
        for name, value in sorted(model.images.state_dict().items()):
            weights.update(
                name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    spec = json.loads(json.dumps(model.spec.to_dict()))
    return {"spec": spec, "text": hashlib.sha256(words).hexdigest(), "image": weights.hexdigest()}


def router_settings(router: RewardRouter) -> dict[str, Any]:
    """A router's settings as data. A custom assignment is given by its name."""
    name = router.assignment if isinstance(router.assignment, str) else getattr(router.assignment, "__name__", "custom")
    return {"assignment": name, "scale": router.scale, "leave_one_out": router.leave_one_out}


# ---------------------------------------------------------------- writing


def save_rollouts(path: Path, batch: RolloutBatch) -> None:
    """Writes one process's rollouts. The write is atomic; missing folders are created."""
    tensors = {"groups": batch.groups_B.cpu().long(), **_columns([s for r in batch.rollouts for s in r.sequence])}
    header = _header(batch)
    if batch.table is not None:
        parts, header["table"] = batch.table.to_tensors()
        if batch.routed is not None:
            routed, header["table"]["routed"] = batch.routed.to_tensors()
            parts |= routed
        tensors |= {_TABLE + name: value for name, value in parts.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # none share memory
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header)}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata)  # `save_file` would make a file that other users cannot read
    write_whole(path, lambda draft: draft.write_bytes(content))


def _columns(segments: Sequence[Segment]) -> dict[str, Tensor]:
    """Each column, concatenated over the segments that have it."""
    found = {"tokens": [s.tokens.int() for s in segments]}
    for name, dtype in _COLUMNS.items():
        found[name] = [v.to(dtype) for s in segments if (v := getattr(s, name)) is not None]
    # Traces are only displayed, so half precision is enough; in float32 they would dominate the file.
    found["trace"] = [s.trace.half().flatten() for s in segments if s.trace is not None]
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _header(batch: RolloutBatch) -> dict[str, Any]:
    return {
        "fits": batch.fits,
        "step": batch.step,
        "config": batch.config,
        "router": batch.router,
        "figures": {k: [None if np.isnan(x) else float(x) for x in v] for k, v in batch.figures.items()},
        "rollouts": [_rollout_header(r, title) for r, title in zip(batch.rollouts, batch.titles)],
    }


def _rollout_header(rollout: Rollout, title: str) -> dict[str, Any]:
    return {
        "title": title,
        "stop": rollout.stop.name,
        "key": rollout.key,
        "settings": asdict(rollout.settings),
        "compute": {phase: cost.to_dict() for phase, cost in rollout.compute.items()},
        "segments": [
            {
                "modality": s.modality.name,
                "prompt": s.prompt,
                "tokens": len(s),
                "grid": s.grid,
                "columns": [name for name in _COLUMNS if getattr(s, name) is not None],
                "steps": None if s.trace is None else len(s.trace),
            }
            for s in rollout.sequence
        ],
    }


# ---------------------------------------------------------------- reading


def load_rollouts(path: str | Path) -> RolloutBatch:
    """Reads a rollout file. Raises FileNotFoundError, or ValueError if the file is truncated, damaged, of another kind,
    or from a newer version."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"rollouts: {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"rollouts: {path} is cut off, or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"rollouts: {path} holds no rollouts, it is of format {metadata.get('format')!r}")
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise ValueError(
            f"rollouts: {path} has version {version or 'unknown'}, this unidiff reads up to {VERSION}: update unidiff"
        )
    try:
        return _batch(json.loads(metadata["header"]), tensors)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"rollouts: {path} is damaged ({type(error).__name__}: {error})") from error


def _batch(header: dict[str, Any], tensors: dict[str, Tensor]) -> RolloutBatch:
    reader = _Reader(tensors)
    rollouts = [_read_rollout(one, reader) for one in header["rollouts"]]
    reader.check_end()
    table, routed = _read_table(header["table"], tensors) if "table" in header else (None, None)
    batch = RolloutBatch(
        rollouts=rollouts,
        titles=[str(one["title"]) for one in header["rollouts"]],
        groups_B=tensors["groups"],
        fits=header["fits"],
        figures={k: [float("nan") if x is None else float(x) for x in v] for k, v in header["figures"].items()},
        table=table,
        routed=routed,
        router=header["router"],
        config=header["config"],
        step=header["step"],
    )
    sizes = {len(batch.groups_B), *map(len, batch.figures.values())}
    sizes |= set() if table is None else {len(table.modality_BS)}
    sizes |= set() if batch.routed is None else {len(batch.routed.advantage_BS)}
    if sizes != {len(batch)}:
        raise ValueError(f"columns of {sorted(sizes)} rows for {len(batch)} rollouts")
    return batch


class _Reader:
    """Splits flat columns into segments, in order."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.at = tensors, dict.fromkeys(("tokens", "trace", *_COLUMNS), 0)

    def take(self, name: str, n: int) -> Tensor:
        column, start = self.tensors.get(name, torch.empty(0)), self.at[name]
        if n < 0 or start + n > len(column):
            raise ValueError(f"{name} has {len(column)} values, {start + n} are asked for")
        self.at[name] += n
        return column[start : start + n]

    def check_end(self) -> None:
        for name, at in self.at.items():
            if at != len(self.tensors.get(name, ())):
                raise ValueError(f"{name} has {len(self.tensors[name])} values, {at} are in use")


def _read_rollout(header: dict[str, Any], reader: _Reader) -> Rollout:
    segments = []
    for one in header["segments"]:
        n, steps = int(one["tokens"]), one["steps"]
        columns: dict[str, Any] = {name: reader.take(name, n) for name in _COLUMNS if name in one["columns"]}
        if steps is not None:
            columns["trace"] = reader.take("trace", int(steps) * n).float().reshape(int(steps), n)
        grid = None if one["grid"] is None else (int(one["grid"][0]), int(one["grid"][1]))
        tokens: Any = reader.take("tokens", n).long()
        segments.append(Segment(Modality[one["modality"]], tokens, bool(one["prompt"]), grid, **columns))
    compute = Compute({phase: Cost(**cost) for phase, cost in header["compute"].items()})
    settings = SamplerConfig(**header["settings"])
    return Rollout(Interleaved(segments), Stop[header["stop"]], compute, int(header["key"]), settings)


def _read_table(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[RewardTable, Routed | None]:
    parts = {name.removeprefix(_TABLE): value for name, value in tensors.items() if name.startswith(_TABLE)}
    routed = Routed.from_tensors(parts, header["routed"]) if "routed" in header else None
    return RewardTable.from_tensors(parts, header), routed
