"""Checkpoints of a trainer: accelerate's state in a run's folder (see unidiff.run_folder).

A checkpoint holds the trained weights and the optimizer's state. Noise is a function of (seed, step, …), so no state
of random generators is saved.
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
    """Claims the folder for a run. Returns the checkpoint to resume from, or None. Called by every process; raises
    ValueError on all of them."""
    found: list[Any] = [None, None]  # the checkpoint, an error
    if accelerator.is_main_process:
        try:
            folder.open(config)
            found[0] = folder.last(getattr(config, config.GROWS)) if config.resume else None
        except ValueError as problem:
            found[1] = str(problem)
    broadcast_object_list(found)  # errors too, or the other processes would wait for ever
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def save(folder: RunFolder, accelerator: Accelerator, step: int) -> Path:
    """Writes a checkpoint after `step` steps; called by every process. Raises WriteError."""
    main, final = accelerator.is_main_process, folder.checkpoint(step)
    saving = folder.saving(step, processes=accelerator.num_processes)
    with named(final), saving if main else contextlib.nullcontext(draft_of(final)) as draft:
        accelerator.wait_for_everyone()  # the draft folder exists
        hook = accelerator.register_save_state_pre_hook(_drop_frozen)
        try:
            accelerator.save_state(str(draft))
        finally:
            hook.remove()
        accelerator.wait_for_everyone()  # every process has written its part
        if main:
            for states in draft.glob("random_states_*.pkl"):
                states.unlink()  # global generators; a run does not use them
    accelerator.wait_for_everyone()
    return final


def load(accelerator: Accelerator, checkpoint: Path) -> None:
    """Restores a checkpoint; called by every process. Raises ValueError if it lacks weights that are trained now."""
    _check_trained(accelerator, checkpoint)
    # Checkpoints have no frozen weights, so strict=False. DeepSpeed has no `strict`, and no frozen weights here.
    how: dict[str, Any] = {} if accelerator.distributed_type is DistributedType.DEEPSPEED else {"strict": False}
    accelerator.load_state(str(checkpoint), **how)


def _drop_frozen(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """Hook of `save_state` that drops frozen weights: they never change. (FSDP and DeepSpeed write their own files,
    with all weights.)"""
    for model, state in zip(models, weights):
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                state.pop(name, None)


def _check_trained(accelerator: Accelerator, folder: Path) -> None:
    """Raises ValueError if a checkpoint lacks weights that are trained now."""
    path = folder / "model.safetensors"
    if not path.is_file():
        return  # FSDP or DeepSpeed wrote this checkpoint, and checks it itself
    with safe_open(path, "pt") as file:
        known = set(file.keys())
    for model in accelerator._models:
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if missing := sorted(trained - known):
            raise ValueError(f"{path} lacks {len(missing)} of the weights that are trained, such as {missing[0]}")
