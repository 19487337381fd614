"""Run folders: what is written, when, and how a run goes on after it was stopped.

    config.json          settings of the run
    metrics.jsonl        one line a step
    checkpoints/step-000040/   accelerate's state (what is trained of the model, optimizer) and progress.json
    rollouts/step-000040.safetensors   what that step was trained on, to look at (see rollout_file)
    model/               the model in its family's published layout, at the end

All noise is a function of (seed, step, …), so the step is all the state that random numbers need.
Every write goes to a temporary name first and is renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import nn

from unidiff.files import DRAFT, write_json, write_text
from unidiff.grpo.config import GRPOConfig

KEPT = 2  # checkpoints that stay


class RunFolder:
    """The output directory of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def rollouts(self, step: int) -> Path:
        """The file of the rollouts that a step was trained on; the first step is 1."""
        return self.path / "rollouts" / f"step-{step:06d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.path.glob("checkpoints/step-*")
        return sorted(p for p in found if p.suffix != DRAFT and (p / "progress.json").is_file())

    def open(self, config: GRPOConfig) -> None:
        """Claims the folder for a run. Raises ValueError if it holds another run, or one with other settings.

        A run that ended before its first step has left nothing to protect, so that a mistaken setting can be mended.
        """
        known = self.path / "config.json"
        if self.begun:
            if not config.resume:
                raise ValueError(
                    f"{self.path} holds another run; go on with it (--resume), choose another --output_dir or delete it"
                )
            before = json.loads(known.read_text()) if known.is_file() else {}
            now = json.loads(json.dumps(config.trained_as()))
            changed = [k for k, v in now.items() if before.get(k, v) != v]
            if changed:
                was = ", ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in changed)
                raise ValueError(f"{self.path} cannot be resumed with other settings: {was}")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(known, config.to_dict())

    @property
    def begun(self) -> bool:
        """A step has been made here, or an evaluation finished."""
        return bool(read_metrics(self.metrics) or self.checkpoints() or (self.path / "summary.json").is_file())

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Metrics of the steps before `step`; later lines, of steps that are to be done again, are dropped."""
        kept = [m for m in read_metrics(self.metrics) if m["step"] < step]
        write_text(self.metrics, "".join(json.dumps(m) + "\n" for m in kept))
        return kept

    def append(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """A checkpoint after `step` steps; called by every process."""
        final = self.path / "checkpoints" / f"step-{step:06d}"
        draft = final.with_name(final.name + DRAFT)
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
        accelerator.wait_for_everyone()
        hook = accelerator.register_save_state_pre_hook(_drop_frozen)
        accelerator.save_state(str(draft))
        hook.remove()
        accelerator.wait_for_everyone()  # every process has written its part
        if accelerator.is_main_process:
            for states in draft.glob("random_states_*.pkl"):
                states.unlink()  # of the global generators, which a run neither uses nor may change
            write_json(draft / "progress.json", {"step": step, "processes": accelerator.num_processes})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(draft, final)
            for old in self.checkpoints()[:-KEPT]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return final

    def load(self, accelerator: Accelerator) -> int:
        """Restores the last checkpoint; the number of steps done, 0 if there is none."""
        found = self.checkpoints()
        if not found:
            return 0
        _check_trained(accelerator, found[-1])
        # What is frozen is in no checkpoint; DeepSpeed, which knows no `strict`, has nothing frozen.
        how: dict[str, Any] = {} if accelerator.distributed_type is DistributedType.DEEPSPEED else {"strict": False}
        accelerator.load_state(str(found[-1]), **how)
        return json.loads((found[-1] / "progress.json").read_text())["step"]


def _drop_frozen(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """A hook of `save_state`: frozen weights are those that the run began with. (FSDP and DeepSpeed write their own
    files, whole.)"""
    for model, state in zip(models, weights):
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                state.pop(name, None)


def _check_trained(accelerator: Accelerator, folder: Path) -> None:
    """Raises ValueError if a checkpoint lacks weights that are trained now."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return  # one that FSDP or DeepSpeed wrote, which checks it
    with safe_open(path, "pt") as file:
        known = set(file.keys())
    for model in accelerator._models:
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if missing := sorted(trained - known):
            raise ValueError(f"{path} lacks {len(missing)} of the weights that are trained, such as {missing[0]}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out
