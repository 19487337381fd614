"""Arms × seeds with one budget: who learns more from the same number of steps?

    python recipes/compare.py --arms assignment --seeds 0,1,2           # joint, normalize_then_sum, factorized, segment
    python recipes/compare.py --arms edit --max_steps 0 --model outputs/run/model
    python recipes/compare.py --arms estimator --seeds 0,1,2            # of texts; image_estimator: of pictures
    python recipes/compare.py --arms estimator --num_iterations 4       # so that those with a ladder of ratios differ
    python recipes/compare.py --arms estimator --pictures false --model outputs/base-text
    python recipes/compare.py --arms sft --seeds 0,1,2                  # the same seconds of more supervised training
    python recipes/compare.py --arms "low: learning_rate=1e-4; high: learning_rate=1e-3"
    python recipes/compare.py --recipe text_to_image --arms sampler --seeds 0,1,2

Every arm is a run of one recipe with the same settings but those of the arm. A run that is there
already, with these settings, is not done again, and one that was stopped goes on. Prints one table of means with 95 %
intervals over seeds (Student's t), and writes it to OUTPUT_DIR as compare.md and compare.json, with the curves in
compare.png.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unidiff.command_line import flags, parse, ungrouped
from unidiff.config import FilePath, build, check_fields, expanded, setting
from unidiff.files import read_json, write_json, write_text
from unidiff.program import run_program
from unidiff.report.results import LEADING
from unidiff.run_folder import RunFolder, read_metrics
from unidiff.sandbox import lifeline
from unidiff.settings_file import from_yaml

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT))  # to import the other recipes

import supervised  # noqa: E402

CONTROL = "supervised"  # not a GRPO run: supervised training for the same seconds
_ESTIMATORS = ("fading_out", "random", "one_step", "coupled", "trace", "elbo", "spg", "wd1", "left_to_right")
ARMS: dict[str, dict[str, dict[str, str]]] = {
    "assignment": {a: {"assignment": a} for a in ("joint", "normalize_then_sum", "factorized", "segment")},
    "credit": {a: {"assignment": a} for a in ("joint", "segment")},
    "edit": {e: {"edit": e} for e in ("full", "region", "confidence", "random")},
    "estimator": {e: {"text_estimator": e} for e in _ESTIMATORS},
    "image_estimator": {e: {"image_estimator": e} for e in ("image_random", *_ESTIMATORS[1:])},
    "loss": {x: {"loss_type": x, "num_iterations": "2"} for x in ("grpo", "dapo", "dr_grpo", "gspo", "gmpo")},
    "sampler": {s: {"image_sampler": s} for s in ("maskgit", "emerge")},
    "sft": {"grpo": {}, CONTROL: {}},
}
SHOWN, SAMPLED = 6, 3  # number of leading figures in the table, of greedy and of sampled responses
ALIKE = ("batch_size", "window_share", "window_batch", "edit_extra", "changed_weight")  # a control keeps these
# Student's t, two-sided 95 %, for 1…9 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


OWN = ("seed", "output_dir", "resume")  # this script sets these for each run


@dataclass
class Config:
    """The runs to compare. Other settings of the recipe apply to every arm that does not set them."""

    recipe: Literal["interleaved_reasoning", "text_math", "text_code", "text_to_image", "image_edit"] = setting(
        "", "interleaved_reasoning", "whose runs are compared"
    )
    arms: str = setting(
        "",
        "assignment",
        "a set of arms by name, or 'name: key=value, ...; name: ...'",
    )
    seeds: tuple[int, ...] = setting("", (0, 1, 2), "with commas")
    parallel: int = setting("", 1, "runs at once, each with its share of the cores")
    threads: int | None = setting("", None, "of each run, instead of its share")
    output_dir: FilePath = setting("", "outputs/compare", "one folder a run is made in it")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("parallel", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {','.join(map(str, self.seeds))!r}; name at least one, each once")


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its folder, its settings, and the command-line words for them."""

    name: str
    folder: RunFolder
    config: Any
    words: tuple[str, ...]

    def check(self) -> bool:
        """Whether the run is finished. Raises ValueError if its folder contains another run."""
        begun = self.folder.begun
        if begun and (changes := self.folder.changes(self.config)):
            was = ", ".join(f"{k} was {before!r}, is {now!r}" for k, (before, now) in changes.items())
            raise ValueError(
                f"{self.folder.path} holds a run of this name with other settings: {was}; choose another name or "
                "--output_dir, or delete it"
            )
        grown = begun and self.folder.settings().get(self.config.GROWS) != getattr(self.config, self.config.GROWS)
        return self.folder.finished and not grown


def main() -> None:
    try:
        config = parse(Config, own_words(sys.argv[1:]), __doc__ or "")
        runs = planned(config, sys.argv[1:])
        for run in runs:
            if run.name != CONTROL:  # its settings are known after the other runs
                run.check()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    with ThreadPoolExecutor(config.parallel) as pool:
        for control in (False, True):  # controls last: they train for the seconds of the others
            list(pool.map(lambda run: done(config, run), [r for r in runs if (r.name == CONTROL) is control]))
    results: dict[str, list[Path]] = {}
    for run in runs:
        results.setdefault(run.name, []).append(run.folder.path)
    report(Path(config.output_dir), results)


def own_words(words: list[str]) -> list[str]:
    """The words of this script's own settings."""
    if {"--help", "-h"} & set(words):
        return ["--help"]
    names = {f.name for f in fields(Config)}
    return [f"--{name}={value}" for name, value in flags(words).items() if name in names]


def planned(config: Config, words: list[str]) -> list[Run]:
    """All runs, checked before the first one starts. Raises ValueError."""
    arms = ARMS.get(config.arms) or parse_arms(config.arms)
    settings_of = importlib.import_module(config.recipe).Config
    given = ungrouped(settings_of, flags(words))
    shared = {k: v for k, v in given.items() if k not in {f.name for f in fields(Config)}}
    file = from_yaml(expanded(shared["config"], "config")) if "config" in shared else {}
    from_file = ungrouped(settings_of, file)
    runs = []
    for name, settings in arms.items():
        if taken := sorted({*shared, *from_file, *settings} & set(OWN)):
            raise ValueError(f"{taken[0]} is set for each run by --seeds and --output_dir, and cannot be given")
        for seed in config.seeds:
            folder = RunFolder(Path(config.output_dir) / f"{name}-seed{seed}")
            given = {**shared, **settings, "seed": str(seed), "output_dir": str(folder.path)}
            if config.threads or "threads" not in from_file:
                given.setdefault("threads", str(threads(config)))
            if name == CONTROL:
                given |= {"model": str(Path(config.output_dir) / f"continued-seed{seed}"), "max_steps": "0"}
            values = {k: v for k, v in given.items() if k != "config"}
            run = build(settings_of, {**from_file, **values})
            runs.append(Run(name, folder, run, tuple(written(given))))
    if runs:
        runs[0].config.made_task()  # raises now if the task or the rewards are unusable
    return runs


def written(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as words of a command line."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from written({f"{key.removesuffix('_options')}.{name}": one for name, one in value.items()})
        else:
            yield f"--{key}={value}"


def parse_arms(text: str) -> dict[str, dict[str, str]]:
    """ "a: x=1, y=2; b: x=3" -> {"a": {"x": "1", "y": "2"}, "b": {"x": "3"}}. Raises ValueError."""
    arms: dict[str, dict[str, str]] = {}
    for part in filter(str.strip, text.split(";")):
        name, colon, settings = (p.strip() for p in part.partition(":"))
        pairs = [p.partition("=") for p in settings.split(",") if p.strip()]
        if not colon or not all(equal for _, equal, _ in pairs):
            raise ValueError(f"arms is {text!r}; it must be one of {', '.join(ARMS)} or 'name: key=value, …; name: …'")
        if name in arms or not name or "/" in name:
            raise ValueError(f"arms is {text!r}; {name!r} must be a folder's name, and each arm have its own")
        arms[name] = {k.strip().replace("-", "_"): v.strip() for k, _, v in pairs}
    return arms


def done(config: Config, run: Run) -> None:
    """Does a run, or the rest of it."""
    try:
        if run.name == CONTROL:
            continued(config, run)
        if not run.check():
            call(config, run, f"{config.recipe}.py")
    except ValueError as error:
        sys.exit(f"error: {error}")


def continued(config: Config, run: Run) -> None:
    """Trains the base model with supervision, for as many seconds as this seed's GRPO arm."""
    folder = RunFolder(run.config.model, *supervised.FILES)
    arm = RunFolder(Path(config.output_dir) / f"grpo-seed{run.config.seed}")
    seconds = json.loads((arm.path / "summary.json").read_text())["seconds_training"]
    given = {"init": arm.settings()["model"], "seed": 1000 + run.config.seed, "max_seconds": seconds}
    given |= {"lr": 0.002, "lr_rest": 0.0003}  # a fifth of the base's rates, as the model has converged
    given |= {"task": run.config.task, "task_options": dict(run.config.task_options), "output_dir": str(folder.path)}
    made = read_json(Path(given["init"]) / supervised.FILES[0]) or {}
    given |= {name: made[name] for name in ALIKE if name in made}
    training = Run(run.name, folder, build(supervised.Config, given), tuple(written(given)))
    if not training.check():
        call(config, training, "supervised.py")


def call(config: Config, run: Run, script: str) -> None:
    """Starts or resumes a run. Its output goes to a file beside its folder."""
    words = [str(ROOT / script), *run.words, *(["--resume"] if run.folder.begun else [])]
    log = run.folder.path.with_name(f"{run.folder.path.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads(config))}
    print(" ".join(["python", *words]), flush=True)
    with log.open("a") as file:
        command = lifeline.command(sys.executable, *words)  # a run ends with this process
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        last = (log.read_text(errors="replace").splitlines() or [""])[-1]
        sys.exit(f"error: {script} failed with {ended.returncode}: {last} (all of it is in {log})")


def threads(config: Config) -> int:
    """CPU threads of one run."""
    return config.threads or max((os.cpu_count() or 1) // config.parallel, 1)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval over seeds (0 for one seed)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), T95[min(n - 2, 8)] * float(np.std(values, ddof=1)) / math.sqrt(n)


def report(out: Path, results: dict[str, list[Path]]) -> None:
    summaries = {
        name: [json.loads((f / "summary.json").read_text()) for f in folders] for name, folders in results.items()
    }
    leading = list(dict.fromkeys(f for runs in summaries.values() for r in runs for f in r.get("leading", LEADING)))
    leading = [f for f in leading if any(f in r["final"]["greedy"] for runs in summaries.values() for r in runs)][
        :SHOWN
    ]
    rows, data = [], {}
    for name, runs in summaries.items():
        cells, data[name] = [], {}
        for way in ("greedy", "sampled"):
            for figure in leading[: SAMPLED if way == "sampled" else None]:
                values = [r["final"][way][figure] for r in runs if figure in r["final"][way]]
                if not values:  # such as image_exact without pictures
                    cells.append("–")
                    continue
                mean, half = interval(values)
                data[name][f"{way}/{figure}"] = {"mean": mean, "half": half}
                cells.append(f"{mean:.3f} ± {half:.3f}")
        for figure in ("token_forwards", "seconds"):
            mean, half = interval([r["rollout"][figure] for r in runs])
            data[name][f"rollout/{figure}"] = {"mean": mean, "half": half}
            cells.append(f"{mean:.4g}")
        for figure in ("seconds_training", "seconds"):
            mean, half = interval([r[figure] for r in runs])
            data[name][figure] = {"mean": mean, "half": half}
            cells.append(f"{mean:.0f}")
        rows.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    names = [*leading, *(f"{f} (T)" for f in leading[:SAMPLED])]
    names += ["token-forwards", "rollout s", "training s", "run s"]
    headline = leading[0] if leading else "reward"
    every = [r for runs in summaries.values() for r in runs]
    ways = [r.get("decoding", "greedy") for r in every]
    base, half = interval([r["base"][way].get(headline, math.nan) for r, way in zip(every, ways)])
    lines = [
        "| arm | seeds | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 2),
        *rows,
        "",
        "Held-out means over seeds ± half of the 95 % interval; (T) = sampled, the others greedy. "
        f"{headline} before training ({', '.join(dict.fromkeys(ways))}), mean over all runs: {base:.3f}.",
    ]
    text = "\n".join([*lines, "", *training_table(results, headline)]) + "\n"
    print(text)
    write_text(out / "compare.md", text)
    write_json(out / "compare.json", data)
    curves(out / "compare.png", results, leading)


def training_table(results: dict[str, list[Path]], headline: str) -> list[str]:
    """The greedy held-out headline during training (`--eval_steps`), seconds of a step's rollouts and update, and the
    router's statistics: means over seeds and steps."""
    runs = {arm: [read_metrics(f / "metrics.jsonl") for f in folders] for arm, folders in results.items()}
    key = f"eval/{headline}"
    steps = sorted({m["step"] + 1 for seeds in runs.values() for run in seeds for m in run if key in m})
    others = {"seconds/rollout": "rollouts s", "seconds/update": "update s"}
    others |= {name: name for name in ("zero_std/text", "zero_std/image", "advantage_correlation")}
    lines = [
        "| arm | " + " | ".join([*(f"{headline} at step {s}" for s in steps), *others.values()]) + " |",
        "|" + "---|" * (len(steps) + len(others) + 1),
    ]
    for arm, seeds in runs.items():
        cells = []
        for s in steps:
            mean, half = interval([m[key] for run in seeds for m in run if m["step"] + 1 == s])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        for name in others:
            values = [m[name] for run in seeds for m in run if m.get(name) is not None]
            cells.append(f"{np.mean(values):.2f}" if values else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


SMOOTH = 5  # steps of the running mean, as every step has other boards


def curves(path: Path, results: dict[str, list[Path]], leading: Sequence[str] = LEADING) -> None:
    """The first leading figures of the training rollouts: running means of the mean over seeds."""
    runs = {arm: [read_metrics(f / "metrics.jsonl") for f in folders] for arm, folders in results.items()}
    panels = [p for p in leading if any(m.get(p) for r in runs.values() for x in r for m in x)][:SAMPLED]
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for at, name in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), at + 1)
        for arm, seeds in runs.items():
            steps = min(map(len, seeds))
            if not steps:
                continue  # an arm that only evaluates
            width = min(SMOOTH, steps)
            mean = np.mean([[m.get(name, math.nan) for m in run[:steps]] for run in seeds], 0)
            axes.plot(range(width, steps + 1), np.convolve(mean, np.ones(width) / width, "valid"), label=arm)
        axes.set(title=name.replace("_", " "), xlabel=f"step (mean of the last {SMOOTH})")
        axes.grid(alpha=0.3)
    if panels:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_program(main)
