"""GRPO on interleaved visual-textual reasoning: the main job.

    accelerate launch recipes/interleaved_reasoning.py                                # minutes, on 2 CPU cores
    accelerate launch recipes/interleaved_reasoning.py --assignment joint --seed 1 --output_dir outputs/joint
    accelerate launch recipes/interleaved_reasoning.py --config recipes/configs/frozen_lake.yaml --max_steps 0
    accelerate launch recipes/interleaved_reasoning.py --config recipes/configs/mmada.yaml --model checkpoints/mmada

The model reads a question and a picture of a frozen lake. It answers in rounds of a sentence that names a move and a
picture of the board after it, then lists its moves. Each new picture starts as a copy of the one before; only the
tokens of the cells that the sentence names are denoised again. Rewards judge every sentence and every picture where it
stands, and the router sends each to the tokens that earned it.

--help lists the settings. OUTPUT_DIR gets summary.json, metrics.jsonl, curves.png, report.html, rollouts, checkpoints,
the model. What a step was trained on, edit by edit:

    python tools/edit_rollout.py --rollouts outputs/run/rollouts/step-000040.safetensors

A run that was stopped or killed goes on with --resume --output_dir OUTPUT_DIR, with the settings that it had; one that
is finished, with a larger --max_steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, launcher
from unidiff.config import FilePath, parse, setting
from unidiff.files import read_json, write_json
from unidiff.grpo.evaluation import Evaluation
from unidiff.grpo.experience import Experience
from unidiff.grpo.process import check_tracker
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, load_rollouts
from unidiff.program import run_program
from unidiff.report.curves import draw_curves
from unidiff.report.gallery import best_and_worst, records
from unidiff.report.page import write_page
from unidiff.report.progress import Progress, results_table
from unidiff.report.record import RolloutRecord
from unidiff.report.results import duration
from unidiff.rewards.names import as_rewards
from unidiff.rewards.reward import RewardError
from unidiff.run_folder import RunFolder, read_metrics, resumed
from unidiff.tasks import FrozenLake

ROOT = Path(__file__).resolve().parent
GALLERY = 6  # rollouts in each gallery of the report


@dataclass(frozen=True)
class Config(GRPOConfig):
    """GRPOConfig, and what is trained: a model, a task and rewards."""

    model: FilePath = setting(
        "run", str(ROOT / "base"), "checkpoint folder or hub name, of any family (docs/families.md)"
    )
    family: str | None = setting("run", None, "of the model, where its config does not tell")
    dtype: Literal["float32", "bfloat16"] = setting("run", "float32", "of the weights that are computed with")
    image_tokenizer: FilePath | None = setting(
        "run", None, "folder of the image tokenizer, if it is not in the model's"
    )
    text_length: int | None = setting(
        "rollout",
        None,
        "tokens in the canvas of one text; none = the family's, which may be too long for several rounds",
    )
    board_size: int = setting("data", 4, "cells of a board's side")
    tile: int | None = setting("data", None, "pixels of a cell's side; none = the board fills the model's picture")
    pictures: bool = setting(
        "data", True, "false = responses are one text; for a model of text alone, or of supervised.py --pictures false"
    )
    rewards: tuple[str, ...] | None = setting(
        "data",
        None,
        "names with commas, of the task's or registered ones, or package.module:function; name=0.5 sets a weight",
    )
    threads: int | None = setting("run", None, "of a process on a CPU; none = the cores divided among the processes")

    FREE: ClassVar[frozenset[str]] = GRPOConfig.FREE | {"threads"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1, or none for a share of the cores")
        # A name that cannot be found is an error now, not after the model is loaded.
        as_rewards(self.rewards or (), FrozenLake().rewards())


def main() -> None:
    sys.path.append(os.getcwd())  # where a user's own rewards may be
    began, command = time.perf_counter(), launcher.command()
    config = parse(Config, description=__doc__ or "", start=resumed(Config))
    again = shlex.join(["--resume", "--output_dir", config.output_dir])

    def on_step(step: int, metrics: dict[str, float], experience: Experience) -> None:
        progress.update(metrics)

    try:
        RunFolder(config.output_dir).check(config)
        accelerator = Accelerator(log_with=config.tracker, project_dir=config.output_dir)
        check_tracker(config.tracker, accelerator)
        if accelerator.device.type == "cpu":
            torch.set_num_threads(config.threads or max((os.cpu_count() or 1) // accelerator.num_processes, 1))
        model = load(config)
        task = task_for(model, config)
        trainer = GRPOTrainer(model, task, config, config.rewards, accelerator=accelerator, on_step=on_step)
        trainer.claim()
        base, galleries = before(model, trainer)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")

    quiet = config.quiet or not accelerator.is_main_process
    try:
        with Progress(config.max_steps, trainer.start, quiet=quiet) as progress:
            trainer.train()
        if not trainer.stopped:
            after(config, trainer, base, galleries, began)
    except (RewardError, OSError) as error:
        sys.exit(f"error: {error}\nMend it and go on with {command} {again}")
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if trainer.stopped:
        message = f"stopped; go on with {command} {again}"
        if accelerator.is_main_process:
            print(message, flush=True)
        launcher.repeat(message)
        sys.exit(130)


Galleries = dict[str, list[RolloutRecord]]


def before(model: UnifiedModel, trainer: GRPOTrainer) -> tuple[dict[str, Evaluation] | None, Galleries]:
    """The held-out figures before training, written to base.json, and rollouts to show; nothing if they are there from
    before the run was stopped. The checkpoint that the run goes on from is restored later."""
    main_process, path = trainer.accelerator.is_main_process, trainer.folder.path / "base.json"
    found = read_json(path) if main_process and trainer.start > 0 else None
    known = [isinstance(found, dict) and found.keys() >= {"greedy", "sampled"}]
    broadcast_object_list(known)
    if known[0]:
        return None, {}
    base = trainer.held_out()
    if not main_process:
        return base, {}
    write_json(path, figures(base))
    return base, {"before training": gallery(model, base)}


def after(
    config: Config,
    trainer: GRPOTrainer,
    base: dict[str, Evaluation] | None,
    galleries: Galleries,
    began: float,
) -> None:
    """Evaluates and writes the model, unless it was not trained, and the results."""
    final = trainer.held_out() if base is None or config.max_steps else base
    if config.max_steps:
        trainer.save_model(trainer.folder.path / "model")
    if trainer.accelerator.is_main_process:
        galleries |= training_galleries(trainer.model, trainer.folder)
        galleries["after training"] = gallery(trainer.model, final)
        finish(config, trainer, final, galleries, time.perf_counter() - began)


def load(config: Config) -> UnifiedModel:
    """The model to begin with. Raises FileNotFoundError or ValueError."""
    given: dict[str, Any] = {"image_tokenizer": config.image_tokenizer}
    given |= {"text_length": config.text_length}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        model = UnifiedModel.from_pretrained(config.model, config.family, getattr(torch, config.dtype), **options)
    except TypeError as error:
        raise ValueError(f"the family of {config.model} takes no {' or '.join(options)}: {error}") from error
    if config.pictures and model.images is None:
        raise ValueError(f"family {model.spec.family} is one of text alone; set --pictures false")
    return model


def task_for(model: UnifiedModel, config: Config) -> FrozenLake:
    """FrozenLake with boards that fill the model's picture, unless `tile` says otherwise."""
    images = model.images
    board = "text" if images is None else "picture"
    task = FrozenLake(size=config.board_size, pictures=config.pictures, board=board)
    tile = config.tile
    if tile is None and images is not None:
        height, width = (n * images.factor for n in model.spec.image_grid)
        if height != width or height % task.size:
            raise ValueError(
                f"board_size is {task.size}, but so many cells do not fill the model's picture of {height} x {width} "
                "pixels; choose another, or give the pixels of a cell's side (--tile)"
            )
        tile = height // task.size
    return dataclasses.replace(task, tile=tile or task.tile)


def figures(held: dict[str, Evaluation]) -> dict:
    """Held-out figures: greedy ones at the top level, both kinds by name beneath."""
    return {**held["greedy"].figures, **{way: one.figures for way, one in held.items()}}


def finish(
    config: Config,
    trainer: GRPOTrainer,
    final: dict[str, Evaluation],
    galleries: Galleries,
    seconds: float,
) -> None:
    """Writes the run's results and prints their table."""
    out = trainer.folder.path
    metrics = read_metrics(trainer.folder.metrics)
    rollout = final["sampled"].compute
    summary = {
        "base": json.loads((out / "base.json").read_text()),
        "final": figures(final),
        "rollout": {**rollout.total.to_dict(), "phases": {k: c.to_dict() for k, c in rollout.items()}},
        "seconds": seconds,
        "seconds_training": sum(m["seconds"] for m in metrics),
        "steps": config.max_steps,
        "processes": trainer.accelerator.num_processes,
        "config": config.to_dict(),
    }
    write_json(out / "summary.json", summary)
    kinds = {r.name: r.on for r in trainer.rewards}
    if metrics:
        draw_curves(metrics, out / "curves.png", kinds=kinds)
    shown = summary | {side: {way: summary[side][way] for way in final} for side in ("base", "final")}
    write_page(
        out / "report.html",
        title=f"unidiff · {out.name}",
        summary=shown,
        metrics=metrics,
        kinds=kinds,
        galleries=galleries,
    )
    print(results_table(shown))
    print(f"{duration(seconds)}; look at {out / 'report.html'}")


def gallery(model: UnifiedModel, held: dict[str, Evaluation]) -> list[RolloutRecord]:
    """The first sampled responses of an evaluation."""
    one = held["sampled"]
    titles = [f"{example.split} board {example.index}" for example in one.examples]
    figures = {name: values.tolist() for name, values in one.per_row.items()}
    batch = RolloutBatch(one.rollouts, titles, torch.arange(len(titles)), fingerprint(model), figures)
    return records(model, batch, range(min(GALLERY, len(titles))), views=one.rows)


def training_galleries(model: UnifiedModel, folder: RunFolder) -> dict[str, list[RolloutRecord]]:
    """From the files of an early, a middle and a late step: the best and the worst rollout of each of a few groups."""
    files = sorted(folder.rollouts(0).parent.glob("step-*.safetensors"))
    galleries = {}
    for path in dict.fromkeys(files[i] for i in (0, len(files) // 2, -1) if files):
        batch = load_rollouts(path)
        chosen = best_and_worst(batch, GALLERY // 2)
        galleries[f"training, step {batch.step}"] = records(model, batch, list(chosen), titles=chosen)
    return galleries


if __name__ == "__main__":
    run_program(main)
