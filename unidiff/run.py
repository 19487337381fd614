"""One run: from a model and a task to report.html. Every recipe calls this.

    run(RunConfig(output_dir="outputs/mine"), task)            # from Python: the results, as in summary.json
    run_recipe(Config, __doc__)                                # from a command line: settings, hints, one-line errors

The output directory gets summary.json, metrics.jsonl, curves.png, report.html, rollouts, checkpoints and the model.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from unidiff import program
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.files import read_json, write_json
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.evaluation import Evaluation
from unidiff.grpo.process import check_tracker, share_cores
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, load_rollouts
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.model import UnifiedModel
from unidiff.report.curves import draw_curves
from unidiff.report.gallery import best_and_worst, records
from unidiff.report.page import write_page
from unidiff.report.progress import Progress, results_table
from unidiff.report.record import RolloutRecord
from unidiff.report.results import duration
from unidiff.rewards.names import as_rewards
from unidiff.rewards.reward import RewardError
from unidiff.run_folder import RunFolder, read_metrics, resumed
from unidiff.tasks.names import resolve
from unidiff.tasks.task import Task, check_task

GALLERY = 6  # rollouts in each gallery of the report


@dataclass(frozen=True)
class RunConfig(GRPOConfig):
    """GRPOConfig plus the model, the task and the rewards."""

    model: FilePath = setting("run", "recipes/base", "checkpoint folder or hub name, of any family (docs/families.md)")
    family: str | None = setting("run", None, "of the model, where its config does not tell")
    dtype: Literal["float32", "bfloat16"] = setting("run", "float32", "of the weights that are computed with")
    image_tokenizer: FilePath | None = setting(
        "run", None, "folder of the image tokenizer, if it is not in the model's"
    )
    text_length: int | None = setting(
        "rollout", None, "tokens in the canvas of one text; none = the family's, often too many for several rounds"
    )
    task: str | None = setting(
        "data", None, "a name, data.jsonl, file.py:name or package.module:name; several with commas (docs/tasks.md)"
    )
    task_options: dict[str, Any] = setting("data", dict, "settings of the task, each as --task.NAME VALUE")
    rewards: tuple[str, ...] | None = setting(
        "data", None, "with commas: names, or package.module:function; name=0.5 sets a weight; none = the task's own"
    )
    threads: int | None = setting("run", None, "of a process on a CPU; none = the cores divided among the processes")

    FREE: ClassVar[frozenset[str]] = GRPOConfig.FREE | {"threads"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1, or none for a share of the cores")

    def resolved(self) -> Task:
        """The task that `task` names. Raises ValueError if `task` is None, and what `unidiff.tasks.resolve` raises."""
        if self.task is None:
            raise ValueError("task is none; name one (--task NAME, see docs/tasks.md)")
        return resolve(self.task, self.task_options)

    def made_task(self) -> Task:
        """The task, with its rows checked. Raises ValueError, FileNotFoundError or ImportError if the task or the
        rewards cannot be used."""
        try:
            task = self.resolved()
            task.check()
            as_rewards(self.rewards or (), as_rewards(task.rewards()))
        except TypeError as error:
            raise ValueError(str(error)) from error
        return task


Galleries = dict[str, list[RolloutRecord]]


def run(config: RunConfig, task: Task | None = None, model: UnifiedModel | None = None) -> dict[str, Any] | None:
    """Trains a model on a task, or continues a stopped run (`config.resume`).

    task, model: used instead of those that the config names.
    Returns the results, as in summary.json; None if a signal stopped the run, which can then be resumed. Raises what
    `Run` and `GRPOTrainer.train` raise.
    """
    return Run(config, task, model).train()


def run_recipe(config_class: type[RunConfig], description: str) -> None:
    """Runs a recipe with settings from the command line. Exits with status 130 if a signal stopped the run."""
    sys.path.append(os.getcwd())  # for a user's own tasks and rewards
    command = program.command()
    config = parse(config_class, description=description, start=resumed(config_class))
    again = f"{command} {shlex.join(['--resume', '--output_dir', config.output_dir])}"
    try:
        one = Run(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    try:
        results = one.train()
    except (RewardError, OSError) as error:
        sys.exit(f"error: {error}\nMend it and go on with {again}")
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    one.end()
    if results is None:
        message = f"stopped; go on with {again}"
        if one.main_process:
            print(message, flush=True)
        program.repeat(message)
        sys.exit(130)


class Run:
    """One run. The constructor claims the folder, loads the model and measures the held-out figures before training.

    It raises ValueError if a setting does not fit the model, the task or the folder, OSError or ImportError if a file
    or package is missing, and FloatingPointError if a weight is not finite.
    """

    def __init__(self, config: RunConfig, task: Task | None = None, model: UnifiedModel | None = None) -> None:
        self.config, self.began = config, time.perf_counter()
        RunFolder(config.output_dir).check(config)
        self.accelerator = Accelerator(log_with=config.tracker, project_dir=config.output_dir)
        check_tracker(config.tracker, self.accelerator)
        share_cores(self.accelerator, config.threads)
        if task is None:
            task = config.made_task()
        else:
            check_task(task).check()
        model = load(config) if model is None else model
        self.trainer = GRPOTrainer(
            model,
            task.fitted(model),
            config,
            config.rewards,
            accelerator=self.accelerator,
            on_step=lambda step, metrics, experience: self.progress.update(metrics),
        )
        self.trainer.claim()
        quiet = config.quiet or not self.main_process
        self.progress = Progress(config.max_steps, self.trainer.start, quiet=quiet, leading=self.trainer.task.headline)
        self.galleries: Galleries = {}
        self.base = self._before()

    @property
    def main_process(self) -> bool:
        return self.accelerator.is_main_process

    def train(self) -> dict[str, Any] | None:
        """All steps, the evaluation after them, and the report. See `run`."""
        with self.progress:
            self.trainer.train()
        return None if self.trainer.stopped else self._after()

    def end(self) -> None:
        """Waits for the other processes and ends the trackers."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _before(self) -> dict[str, Evaluation] | None:
        """Measures the held-out figures before training and writes base.json. Returns None if a resumed run finds the
        file already there. The checkpoint of a resumed run is loaded later."""
        path = self.trainer.folder.path / "base.json"
        found = read_json(path) if self.main_process and self.trainer.start > 0 else None
        known = [isinstance(found, dict) and found.keys() >= {"greedy", "sampled"}]
        broadcast_object_list(known)
        if known[0]:
            return None
        base = self.trainer.held_out()
        if self.main_process:
            write_json(path, figures(base, self.trainer.task.decoding))
            self.galleries["before training"] = gallery(self.trainer.model, base)
        return base

    def _after(self) -> dict[str, Any]:
        """Evaluates, then writes the model (if it was trained) and the results."""
        trainer, trained = self.trainer, self.config.max_steps > 0
        final = trainer.held_out() if self.base is None or trained else self.base
        if trained:
            trainer.save_model(trainer.folder.path / "model")
        if not self.main_process:
            return {}
        self.galleries |= training_galleries(trainer.model, trainer.folder)
        self.galleries["after training"] = gallery(trainer.model, final)
        return self._report(final)

    def _report(self, final: dict[str, Evaluation]) -> dict[str, Any]:
        """Writes summary.json, curves.png and report.html, and prints the table of results."""
        out, config = self.trainer.folder.path, self.config
        metrics = read_metrics(self.trainer.folder.metrics)
        rollout, seconds = final["sampled"].compute, time.perf_counter() - self.began
        # The first of the task's headline figures that the final evaluation has.
        decoding = self.trainer.task.decoding
        known = figures(final, decoding)
        headline = next((name for name in self.trainer.task.headline if name in known), None)
        summary = {
            "task": config.task or type(self.trainer.task).__name__,
            "headline": headline,
            "leading": list(self.trainer.task.headline),
            "base": json.loads((out / "base.json").read_text()),
            "decoding": decoding,
            "final": known,
            "rollout": {**rollout.total.to_dict(), "phases": {k: c.to_dict() for k, c in rollout.items()}},
            "seconds": seconds,
            "seconds_training": sum(m["seconds"] for m in metrics),
            "steps": config.max_steps,
            "processes": self.accelerator.num_processes,
            "config": config.to_dict(),
        }
        write_json(out / "summary.json", summary)
        kinds = {r.name: r.on for r in self.trainer.rewards}
        if metrics:
            draw_curves(metrics, out / "curves.png", kinds=kinds, leading=summary["leading"])
        shown = summary | {side: {way: summary[side][way] for way in final} for side in ("base", "final")}
        title = f"unidiff · {out.name}"
        page = out / "report.html"
        write_page(page, title=title, summary=shown, metrics=metrics, kinds=kinds, galleries=self.galleries)
        print(results_table(shown))
        print(f"{duration(seconds)}; look at {page}")
        return summary


def load(config: RunConfig) -> UnifiedModel:
    """Loads the initial model. Raises FileNotFoundError or ValueError."""
    given: dict[str, Any] = {"image_tokenizer": config.image_tokenizer, "text_length": config.text_length}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        return UnifiedModel.from_pretrained(config.model, config.family, getattr(torch, config.dtype), **options)
    except TypeError as error:
        raise ValueError(f"the family of {config.model} takes no {' or '.join(options)}: {error}") from error


def figures(held: dict[str, Evaluation], decoding: str) -> dict[str, Any]:
    """Held-out figures. The top level holds those of the task's decoding; "greedy" and "sampled" hold each kind."""
    return {**held[decoding].figures, **{way: one.figures for way, one in held.items()}}


def gallery(model: UnifiedModel, held: dict[str, Evaluation]) -> list[RolloutRecord]:
    """The first sampled responses of an evaluation."""
    one = held["sampled"]
    titles = [example.title for example in one.examples]
    per_row = {name: values.tolist() for name, values in one.per_row.items()}
    batch = RolloutBatch(one.rollouts, titles, torch.arange(len(titles)), fingerprint(model), per_row)
    return records(model, batch, range(min(GALLERY, len(titles))), views=one.rows)


def training_galleries(model: UnifiedModel, folder: RunFolder) -> Galleries:
    """The best and the worst rollout of a few groups, at an early, a middle and a late training step."""
    files = sorted(folder.rollouts(0).parent.glob("step-*.safetensors"))
    galleries = {}
    for path in dict.fromkeys(files[i] for i in (0, len(files) // 2, -1) if files):
        batch = load_rollouts(path)
        chosen = best_and_worst(batch, GALLERY // 2)
        galleries[f"training, step {batch.step}"] = records(model, batch, list(chosen), titles=chosen)
    return galleries
