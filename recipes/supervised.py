"""Masked-diffusion supervised training of a native model on demonstrations. Makes recipes/base.

    python recipes/supervised.py --output_dir outputs/base            # FrozenLake; about an hour on 2 CPU cores
    python recipes/supervised.py --config recipes/configs/supervised/tasks.yaml     # pictures, edits, sums, code
    python recipes/supervised.py --init recipes/base --task my_task.py:task --steps 500
    python recipes/supervised.py --init recipes/base --steps 100      # a continued run
    python recipes/supervised.py --pictures false --output_dir outputs/base-text     # responses of one text
    python recipes/supervised.py --resume --output_dir outputs/base   # go on after Ctrl-C or a kill
    accelerate launch recipes/supervised.py                          # each of its processes takes a share of a step

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from unidiff import program, supervised
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.families import native
from unidiff.files import read_json, write_json
from unidiff.grpo.checkpoint import claim
from unidiff.grpo.process import everybody, share_cores, stop_signals
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.program import run_program
from unidiff.run_folder import PROGRESS, SUMMARY, RunFolder, resumed, step_of
from unidiff.sequence import Interleaved
from unidiff.tasks import FrozenLake, Task, resolve
from unidiff.tasks.mix import Mix, mix

ROOT = Path(__file__).resolve().parent.parent
FROZEN = (0.75, 0.6, 0.9)  # probabilities that a cell is ice
FILES = ("training.json", "supervised.jsonl")  # settings and metrics; config.json is the model's
TEXT_LENGTH = {True: 8, False: 32}  # tokens of the longest text, by `pictures`: a move, or a whole solution


@dataclass
class Config(supervised.SupervisedConfig):
    """SupervisedConfig plus the task, the model and the output folder."""

    task: str = setting("data", "frozen_lake", "what is imitated; several with commas, shared by --task.weights")
    task_options: dict[str, Any] = setting("data", dict, "settings of the task, each as --task.NAME VALUE")
    init: FilePath | None = setting("run", None, "checkpoint to continue from; none = a fresh model on `tokenizers`")
    tokenizers: FilePath = setting("run", str(ROOT / "tokenizers/native"), "of a fresh model")
    text_length: int | None = setting("run", None, "longest text of a fresh model; none = of FrozenLake's")
    output_dir: FilePath = setting("run", "outputs/base", "folder of the model")
    resume: bool = setting("run", False, "go on from the last checkpoint in output_dir, with the settings there")
    save_every: int = setting("run", 500, "steps between checkpoints; 0 = only at the end and when stopped")
    d_model: int = setting("run", 128, "width of a fresh model")
    layers: int = setting("run", 6, "layers of a fresh model")
    axes: bool = setting("run", False, "rotary positions of a fresh model count rows and columns too")
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
        folder.check(config)
        accelerator = Accelerator()
        share_cores(accelerator)
        last = claim(folder, accelerator, config)
        model = start(config) if last is None else UnifiedModel.from_pretrained(last / "model")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        training = Training(config, folder, model.to(accelerator.device), accelerator)
        training.load(last)
        with stop_signals() as asked:
            training.run(asked)
    except OSError as error:
        sys.exit(f"error: {error}\nMend it and go on with {again}")
    if not training.finished:
        message = f"stopped; go on with {again}"
        if accelerator.is_main_process:
            print(message, flush=True)
        program.repeat(message)
        sys.exit(130)


class Training:
    """A model with its optimizers, demonstrations and progress. Several processes share the rows of each step; the
    result is the same as with one process."""

    def __init__(self, config: Config, folder: RunFolder, model: UnifiedModel, accelerator: Accelerator) -> None:
        self.config, self.folder, self.model, self.accelerator = config, folder, model, accelerator
        began = time.perf_counter()
        self.corpora = supervised.corpora(demonstrations(model, config))
        self.say(f"{sum(len(c.rows) for c in self.corpora)} demonstrations in {time.perf_counter() - began:.0f} s")
        self.optimizers = supervised.optimizers(model, config)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.done, self.seconds, self.finished = 0, 0.0, False

    def say(self, line: object) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)

    def load(self, last: Path | None) -> None:
        """Restores a checkpoint; None = starts from the beginning."""
        self.done = step_of(last)
        if last is not None:
            self.seconds = read_json(last / PROGRESS)["seconds"]
            states = torch.load(last / "optimizers.pt", weights_only=True, map_location=self.accelerator.device)
            for optimizer, state in zip(self.optimizers, states):
                optimizer.load_state_dict(state)
        if self.accelerator.is_main_process:
            (self.folder.path / SUMMARY).unlink(missing_ok=True)  # of a finished run that now continues
            self.folder.rewind(self.done)

    def run(self, asked: list[int]) -> None:
        """Trains to the end, or until any process receives a signal. asked: signals that this process received. Raises
        WriteError."""
        config, spent, began = self.config, self.seconds, time.perf_counter()
        stopped = False
        while self.done < config.steps and not stopped:
            if config.max_seconds is not None and self.seconds >= config.max_seconds:
                break
            self.step()
            here = (spent + time.perf_counter() - began, bool(asked))
            seconds, signals = zip(*everybody(here, self.accelerator))
            self.seconds, stopped = max(seconds), any(signals)
            if stopped or self.done == config.steps or (config.save_every and self.done % config.save_every == 0):
                self.save()
        self.finished = not stopped
        if self.finished and self.accelerator.is_main_process:
            self.model.save_pretrained(self.folder.path)
            write_json(self.folder.path / SUMMARY, {"steps": self.done, "seconds": self.seconds})
        self.accelerator.wait_for_everyone()

    def step(self) -> None:
        """One step of the optimizers. Learning rates decay with the steps, or with `max_seconds` with time."""
        config, planned = self.config, self.config.steps
        if config.max_seconds is not None:
            planned = max(self.done + 1, round(self.done * config.max_seconds / max(self.seconds, 1e-9)))
        factor = supervised.lr_factor(self.done, planned, config.warmup, config.decay)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = rate * factor
        share = self.accelerator.process_index, self.accelerator.num_processes
        losses = {}
        for corpus in self.corpora:
            canvas, mask = supervised.batch(self.model, corpus, config, self.done, share)
            found = supervised.supervised_loss(self.model, canvas, mask, config.changed_weight, self.accelerator)
            (torch.stack(list(found.values())).sum() * corpus.weight).backward()
            start = f"{corpus.name}/" if len(self.corpora) > 1 else ""
            losses |= {start + name: loss.detach() for name, loss in found.items()}
        supervised.sum_gradients(self.model, self.accelerator)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.done % 20 == 0 or self.done == config.steps - 1:
            self.log(losses)
        self.done += 1

    def log(self, losses: dict[str, torch.Tensor]) -> None:
        """Logs the step's losses before its update, summed over processes; a loss of 0 (no such tokens) is left out."""
        whole = supervised.summed(torch.stack(list(losses.values())), self.accelerator).tolist()
        line = {"step": self.done, **{name: round(value, 4) for name, value in zip(losses, whole) if value}}
        line["seconds"] = round(self.seconds, 1)
        self.say(line)
        if self.accelerator.is_main_process:
            self.folder.append(line)

    def save(self) -> None:
        """Writes a checkpoint. Raises WriteError."""
        if self.accelerator.is_main_process:
            with self.folder.saving(self.done, seconds=self.seconds) as draft:
                self.model.save_pretrained(draft / "model")
                torch.save([o.state_dict() for o in self.optimizers], draft / "optimizers.pt")
        self.accelerator.wait_for_everyone()


def demonstrations(model: UnifiedModel, config: Config) -> dict[str, list[Interleaved]]:
    """Demonstrations of each task by name, in proportion to the tasks' weights. FrozenLake uses boards with few, some
    and many holes, for more variety than the task's own boards."""
    task = resolve(config.task, config.task_options)
    task.check()
    several = task if isinstance(task, Mix) else mix(task=task)
    found = {}
    for weight, (name, one) in zip(several.weights, several.tasks.items()):
        own: list[Task] = [one]
        if isinstance(one, FrozenLake):
            own = [replace(one, frozen_probability=p, pictures=config.pictures) for p in FROZEN]
        count, rows = round(config.corpus * weight / sum(several.weights)), []
        for i, each in enumerate(own):
            indices = range(i, count, len(own))
            if (size := each.length("train")) is not None:
                indices = range(min(len(indices), size))
            rows += supervised.corpus(model, each.fitted(model), indices)
        found[name] = rows
    return found


def start(config: Config) -> UnifiedModel:
    if config.init is not None:
        return UnifiedModel.from_pretrained(config.init)
    folder = Path(config.tokenizers)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    images = PatchVQ.from_pretrained(folder / "image").eval()
    return native.build(
        tokenizer,
        images,
        text_length=config.text_length or TEXT_LENGTH[config.pictures],
        d_model=config.d_model,
        layers=config.layers,
        axes=config.axes,
        seed=config.seed,
    )


if __name__ == "__main__":
    run_program(main)
