"""Arms × seeds with one budget: who learns more from the same number of steps?

    python recipes/compare.py --arms assignment --seeds 0,1,2           # joint, normalize_then_sum, factorized, segment
    python recipes/compare.py --arms edit --max_steps 0 --model outputs/run/model
    python recipes/compare.py --arms estimator --seeds 0,1,2            # of texts; image_estimator: of pictures
    python recipes/compare.py --arms estimator --num_iterations 4       # so that those with a ladder of ratios differ
    python recipes/compare.py --arms estimator --pictures false --model outputs/base-text
    python recipes/compare.py --arms sft --seeds 0,1,2                  # the same seconds of more supervised training
    python recipes/compare.py --arms "low: learning_rate=1e-4; high: learning_rate=1e-3"

Every arm is a run of recipes/interleaved_reasoning.py with the same settings but those of the arm; a run that is there
already is not done again. Prints one table of means with 95 % intervals over seeds (Student's t), and writes it to
OUTPUT_DIR as compare.md and compare.json, with the curves in compare.png.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unidiff.config import parse
from unidiff.files import write_json, write_text
from unidiff.program import run_program
from unidiff.run_folder import read_metrics
from unidiff.sandbox import lifeline

ROOT = Path(__file__).resolve().parent

CONTROL = "supervised"  # not a run of GRPO: the same seconds of supervised training
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
FIGURES = ("success", "image_exact", "format", "agreement", "legal", "progress")
# Student's t, two-sided 95 %, for 1…9 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class Config:
    """arms: a set by name (assignment, credit, edit, estimator, image_estimator, loss, sampler, sft), or
    "name: key=value, …; name: …".
    seeds: separated by commas. parallel: runs at once, each with its share of the cores. output_dir: one folder a run
    is made in it. Any other setting of interleaved_reasoning.py may be given too, and holds for every arm."""

    arms: str = "assignment"
    seeds: tuple[int, ...] = (0, 1, 2)
    parallel: int = 1
    output_dir: str = "outputs/compare"


def main() -> None:
    own, rest = split(sys.argv[1:])
    config = parse(Config, own, __doc__ or "")
    arms = ARMS.get(config.arms) or parse_arms(config.arms)
    out = Path(config.output_dir)
    results: dict[str, list[Path]] = {name: [] for name in arms}
    with ThreadPoolExecutor(config.parallel) as pool:
        for control in (False, True):  # the control trains as many seconds as the others did: it comes last
            jobs = [(name, seed) for seed in config.seeds for name in arms if (name == CONTROL) is control]
            folders = pool.map(lambda job: run(config, out, job[0], job[1], arms[job[0]], rest), jobs)
            for (name, _), folder in zip(jobs, folders):
                results[name].append(folder)
    report(out, results)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of this script's own settings, and those that are passed on."""
    names = {f"--{n}" for n in Config.__dataclass_fields__} | {"--help", "-h"}
    own, rest, target = [], [], []
    for word in words:
        if word.startswith("-"):
            target = own if word.partition("=")[0] in names else rest
        target.append(word)
    return own, rest


def parse_arms(text: str) -> dict[str, dict[str, str]]:
    """ "a: x=1, y=2; b: x=3" -> {"a": {"x": "1", "y": "2"}, "b": {"x": "3"}}."""
    arms = {}
    for part in text.split(";"):
        name, colon, settings = part.partition(":")
        if not colon:
            sys.exit(f"error: arms is {text!r}; it must be one of {', '.join(ARMS)} or 'name: key=value; …'")
        pairs = (p.partition("=") for p in settings.split(",") if p.strip())
        arms[name.strip()] = {k.strip(): v.strip() for k, _, v in pairs}
    return arms


def run(config: Config, out: Path, name: str, seed: int, settings: dict[str, str], rest: list[str]) -> Path:
    """One arm with one seed; returns its folder."""
    folder = out / f"{name}-seed{seed}"
    if (folder / "summary.json").is_file():
        return folder
    if name == CONTROL:
        rest = [*rest, "--model", str(continued(config, out, seed, rest)), "--max_steps", "0"]
    words = [w for k, v in settings.items() for w in (f"--{k}", v)]
    words += ["--threads", str(threads(config))]
    resume = ["--resume"] if (folder / "config.json").is_file() else []
    script = ROOT / "interleaved_reasoning.py"
    call(config, folder, [str(script), *rest, *words, "--seed", str(seed), "--output_dir", str(folder), *resume])
    return folder


def continued(config: Config, out: Path, seed: int, rest: list[str]) -> Path:
    """The base model after as many seconds of supervised training as the GRPO arm of this seed trained."""
    folder = out / f"continued-seed{seed}"
    if not (folder / "training.json").is_file():
        grpo = json.loads((out / f"grpo-seed{seed}" / "summary.json").read_text())
        model = rest[rest.index("--model") + 1] if "--model" in rest else str(ROOT / "base")
        words = ["--init", model, "--seed", str(1000 + seed), "--max_seconds", str(grpo["seconds_training"])]
        words += ["--lr", "0.002", "--lr_rest", "0.0003"]  # a fifth of those of the base: a converged model goes on
        call(config, folder, [str(ROOT / "supervised.py"), *words, "--output_dir", str(folder)])
    return folder


def call(config: Config, folder: Path, words: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads(config))}
    print(" ".join(["python", *words]), flush=True)
    with (folder / "log.txt").open("a") as log:
        command = lifeline.command(sys.executable, *words)  # a run does not go on without this process
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"error: {words[0]} failed with {done.returncode}; see {folder / 'log.txt'}")


def threads(config: Config) -> int:
    """CPU threads of one run."""
    return max((os.cpu_count() or 1) // config.parallel, 1)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds (0 for a single one)."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), T95[min(n - 2, 8)] * float(np.std(values, ddof=1)) / math.sqrt(n)


def report(out: Path, results: dict[str, list[Path]]) -> None:
    summaries = {
        name: [json.loads((f / "summary.json").read_text()) for f in folders] for name, folders in results.items()
    }
    rows, data = [], {}
    for name, runs in summaries.items():
        cells, data[name] = [], {}
        for way in ("greedy", "sampled"):
            for figure in FIGURES[: 3 if way == "sampled" else None]:
                mean, half = interval([r["final"][way][figure] for r in runs])
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
    names = [*FIGURES, *(f"{f} (T)" for f in FIGURES[:3]), "token-forwards", "rollout s", "training s", "run s"]
    base, half = interval([r["base"]["greedy"]["success"] for runs in summaries.values() for r in runs])
    lines = [
        "| arm | seeds | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 2),
        *rows,
        "",
        "Held-out means over seeds ± half of the 95 % interval; (T) = sampled, the others greedy. "
        f"Success before training, mean over all runs: {base:.3f}.",
    ]
    text = "\n".join([*lines, "", *training_table(results)]) + "\n"
    print(text)
    write_text(out / "compare.md", text)
    write_json(out / "compare.json", data)
    curves(out / "compare.png", results)


def training_table(results: dict[str, list[Path]]) -> list[str]:
    """Greedy held-out success on the way (`--eval_steps`), seconds of a step's rollouts and update, and what the router
    saw: means over seeds and steps."""
    runs = {arm: [read_metrics(f / "metrics.jsonl") for f in folders] for arm, folders in results.items()}
    steps = sorted({m["step"] + 1 for seeds in runs.values() for run in seeds for m in run if "eval/success" in m})
    others = {"seconds/rollout": "rollouts s", "seconds/update": "update s"}
    others |= {name: name for name in ("zero_std/text", "zero_std/image", "advantage_correlation")}
    lines = [
        "| arm | " + " | ".join([*(f"success at step {s}" for s in steps), *others.values()]) + " |",
        "|" + "---|" * (len(steps) + len(others) + 1),
    ]
    for arm, seeds in runs.items():
        cells = []
        for s in steps:
            mean, half = interval([m["eval/success"] for run in seeds for m in run if m["step"] + 1 == s])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        for name in others:
            values = [m[name] for run in seeds for m in run if m.get(name) is not None]
            cells.append(f"{np.mean(values):.2f}" if values else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


SMOOTH = 5  # steps whose mean is drawn: every step has other boards


def curves(path: Path, results: dict[str, list[Path]]) -> None:
    """Success, image exactness (of responses with images) and progress of the training rollouts: running means of the
    mean over seeds."""
    runs = {arm: [read_metrics(f / "metrics.jsonl") for f in folders] for arm, folders in results.items()}
    panels = [
        p for p in ("success", "image_exact", "progress") if any(m[p] for r in runs.values() for x in r for m in x)
    ]
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for at, name in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), at + 1)
        for arm, seeds in runs.items():
            steps = min(map(len, seeds))
            if not steps:
                continue  # an arm that only evaluates
            width = min(SMOOTH, steps)
            mean = np.mean([[m[name] for m in run[:steps]] for run in seeds], 0)
            axes.plot(range(width, steps + 1), np.convolve(mean, np.ones(width) / width, "valid"), label=arm)
        axes.set(title=name.replace("_", " "), xlabel=f"step (mean of the last {SMOOTH})")
        axes.grid(alpha=0.3)
    if panels:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_program(main)
