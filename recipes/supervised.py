"""Masked-diffusion supervised training of a native model on demonstrations. Makes recipes/base.

    python recipes/supervised.py --output_dir outputs/base            # FrozenLake; about an hour on 2 CPU cores
    python recipes/supervised.py --config recipes/configs/supervised/tasks.yaml     # pictures, edits, sums, code
    python recipes/supervised.py --init recipes/base --task my_task.py:task --steps 500
    python recipes/supervised.py --init recipes/base --steps 100      # a continued run
    python recipes/supervised.py --pictures false --output_dir outputs/base-text     # responses of one text
    python recipes/supervised.py --resume --output_dir outputs/base   # go on after Ctrl-C or a kill

OUTPUT_DIR gets the model, and beside its files training.json, supervised.jsonl, checkpoints and, at the end,
summary.json.

A task shows how it is done (`Task.demonstration`). FrozenLake's demonstrator walks partly towards the goal and partly
by habit (see FrozenLake.walker_probabilities), so that what is learnt is how to see, move and draw; where to go is left
for reinforcement learning. The other tasks' demonstrators are right only in part, for the same reason.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoTokenizer

from unidiff import program, supervised
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.families import native
from unidiff.files import read_json, write_json
from unidiff.grpo.process import stop_signals
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.program import run_program
from unidiff.run_folder import PROGRESS, SUMMARY, RunFolder, resumed, step_of
from unidiff.sequence import Interleaved
from unidiff.tasks import FrozenLake, Task, resolve

ROOT = Path(__file__).resolve().parent.parent
FROZEN = (0.75, 0.6, 0.9)  # chance that a cell is ice
FILES = ("training.json", "supervised.jsonl")  # settings and metrics; config.json is the model's
TEXT_LENGTH = {True: 8, False: 32}  # tokens of the longest text: of a move, and of a whole solution


@dataclass
class Config(supervised.SupervisedConfig):
    """SupervisedConfig, and what is trained and where it is saved."""

    task: tuple[str, ...] = setting("data", ("frozen_lake",), "what is imitated, in equal shares; see docs/tasks.md")
    init: FilePath | None = setting("run", None, "checkpoint to continue from; none = a fresh model on `tokenizers`")
    tokenizers: FilePath = setting("run", str(ROOT / "tokenizers/native"), "of a fresh model")
    text_length: int | None = setting("run", None, "longest text of a fresh model; none = of FrozenLake's")
    output_dir: FilePath = setting("run", "outputs/base", "folder of the model")
    resume: bool = setting("run", False, "go on from the last checkpoint in output_dir, with the settings there")
    save_every: int = setting("run", 500, "steps between checkpoints; 0 = only at the end and when stopped")
    d_model: int = setting("run", 128, "width of a fresh model")
    layers: int = setting("run", 6, "layers of a fresh model")
    pictures: bool = setting("data", True, "false = demonstrations of one text, without pictures")
    max_seconds: float | None = setting(
        "optimizer", None, "end after this much training time, and let the rates fall with time instead of steps"
    )

    FREE: ClassVar[frozenset[str]] = frozenset({"output_dir", "resume", "save_every"})
    GROWS: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"steps": 0, "save_every": 0, "d_model": 1, "layers": 1, "corpus": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def main() -> None:
    command = program.command()
    config = parse(Config, description=__doc__ or "", start=resumed(Config, FILES[0]))
    folder = RunFolder(config.output_dir, *FILES)
    again = f"{command} --resume --output_dir {shlex.quote(config.output_dir)}"
    try:
        folder.open(config)
        last = folder.last(config.steps) if config.resume else None
        model = start(config) if last is None else UnifiedModel.from_pretrained(last / "model")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        with stop_signals() as asked:
            train(config, folder, model, last, asked)
    except OSError as error:
        sys.exit(f"error: {error}\nMend it and go on with {again}")
    if not folder.finished:
        message = f"stopped; go on with {again}"
        print(message, flush=True)
        program.repeat(message)
        sys.exit(130)


def train(config: Config, folder: RunFolder, model: UnifiedModel, last: Path | None, asked: list[int]) -> None:
    """Trains from a checkpoint, if there is one, to the end, or until a signal is asked for. Raises WriteError."""
    began = time.perf_counter()
    rows = demonstrations(model, config)
    print(f"{len(rows)} demonstrations in {time.perf_counter() - began:.0f} s", flush=True)
    optimizers = supervised.optimizers(model, config)
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    done, spent = step_of(last), 0.0
    if last is not None:
        spent = read_json(last / PROGRESS)["seconds"]
        for optimizer, state in zip(optimizers, torch.load(last / "optimizers.pt", weights_only=True)):
            optimizer.load_state_dict(state)
    (folder.path / SUMMARY).unlink(missing_ok=True)  # of a run that is extended
    folder.rewind(done)

    began = time.perf_counter() - spent
    while done < config.steps and not asked:
        planned, elapsed = config.steps, time.perf_counter() - began
        if config.max_seconds is not None:
            if elapsed >= config.max_seconds:
                break
            planned = max(done + 1, round(done * config.max_seconds / max(elapsed, 1e-9))) if done else planned
        factor = supervised.lr_factor(done, planned, config.warmup, config.decay)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        losses = step(model, optimizers, rows, config, done)
        if done % 20 == 0 or done == config.steps - 1:
            line = {"step": done, **{k: round(v.item(), 4) for k, v in losses.items()}}
            line["seconds"] = round(time.perf_counter() - began, 1)
            print(line, flush=True)
            folder.append(line)
        done += 1
        if asked or done == config.steps or (config.save_every and done % config.save_every == 0):
            with folder.saving(done, seconds=time.perf_counter() - began) as draft:
                model.save_pretrained(draft / "model")
                torch.save([o.state_dict() for o in optimizers], draft / "optimizers.pt")
    if not asked:
        model.save_pretrained(folder.path)
        write_json(folder.path / SUMMARY, {"steps": done, "seconds": time.perf_counter() - began})


def step(
    model: UnifiedModel,
    optimizers: list[torch.optim.Optimizer],
    rows: list[Interleaved],
    config: Config,
    number: int,
) -> dict[str, torch.Tensor]:
    """One step of the optimizers; the losses before it."""
    canvas, mask = supervised.batch(model, rows, config, number)
    losses = supervised.supervised_loss(model, canvas, mask, config.changed_weight)
    torch.stack(list(losses.values())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def demonstrations(model: UnifiedModel, config: Config) -> list[Interleaved]:
    """Those of each task. Of FrozenLake on boards with few, some and many holes: more layouts to learn from than those
    of the task alone."""
    rows, names = [], len(config.task)
    for n, name in enumerate(config.task):
        tasks: list[Task] = [resolve(name)]
        if name == "frozen_lake":
            tasks = [FrozenLake(frozen_probability=p, pictures=config.pictures) for p in FROZEN]
        for i, task in enumerate(tasks):
            rows += supervised.corpus(model, task, range(n + i * names, config.corpus, names * len(tasks)))
    return rows


def start(config: Config) -> UnifiedModel:
    if config.init is not None:
        return UnifiedModel.from_pretrained(config.init)
    folder = Path(config.tokenizers)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    images = PatchVQ.from_pretrained(folder / "image").eval()
    text_length = config.text_length or TEXT_LENGTH[config.pictures]
    return native.build(
        tokenizer, images, text_length=text_length, d_model=config.d_model, layers=config.layers, seed=config.seed
    )


if __name__ == "__main__":
    run_program(main)
