"""Checkpoints of a trainer: accelerate's state in a run's folder (see unidiff.run_folder).

A checkpoint holds what is trained of the model, and the optimizer. All noise is a function of (seed, step, …), so the
step is all the state that random numbers need.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import safe_open
from torch import nn

from unidiff.files import draft_of, named
from unidiff.run_folder import RunFolder, Settings


def claim(folder: RunFolder, accelerator: Accelerator, config: Settings) -> Path | None:
    """Takes the folder for a run, and finds the checkpoint that it goes on from, if any; called by every process.
    Raises ValueError, on each of them."""
    found: list[Any] = [None, None]  # the checkpoint, an error
    if accelerator.is_main_process:
        try:
            folder.open(config)
            found[0] = folder.last(getattr(config, config.GROWS)) if config.resume else None
        except ValueError as problem:
            found[1] = str(problem)
    broadcast_object_list(found)  # or the other processes would wait for this one for ever
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def save(folder: RunFolder, accelerator: Accelerator, step: int) -> Path:
    """A checkpoint after `step` steps; called by every process. Raises WriteError."""
    main, final = accelerator.is_main_process, folder.checkpoint(step)
    saving = folder.saving(step, processes=accelerator.num_processes)
    with named(final), saving if main else contextlib.nullcontext(draft_of(final)) as draft:
        accelerator.wait_for_everyone()  # the draft is there
        hook = accelerator.register_save_state_pre_hook(_drop_frozen)
        try:
            accelerator.save_state(str(draft))
        finally:
            hook.remove()
        accelerator.wait_for_everyone()  # every process has written its part
        if main:
            for states in draft.glob("random_states_*.pkl"):
                states.unlink()  # of the global generators, which a run neither uses nor may change
    accelerator.wait_for_everyone()
    return final


def load(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restores a checkpoint; called by every process. Raises ValueError if it does not fit what is trained now."""
    _check_trained(accelerator, checkpoint)
    # What is frozen is in no checkpoint; DeepSpeed, which knows no `strict`, has nothing frozen.
    how: dict[str, Any] = {} if accelerator.distributed_type is DistributedType.DEEPSPEED else {"strict": False}
    accelerator.load_state(str(checkpoint), **how)


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
