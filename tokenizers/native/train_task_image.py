"""Train an image tokenizer on the pictures of any tasks: of prompts, and of responses by a demonstrator, an oracle and
chance.

    python tokenizers/native/train_task_image.py --task maze,sokoban --out outputs/image
    python tokenizers/native/train_task_image.py --task my_task.py:puzzle --codes 256 --out outputs/image

Every task has the same share of each batch. Pictures of the train split are learnt; those of the test split are encoded
and decoded again, and for puzzles their cells are read back, in the states that an oracle and chance come to. A task's
pictures must have one size, a multiple of 8.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from train_image import pixels_of, train

from unidiff.images import to_pil
from unidiff.images.patch_vq import PatchVQ, PatchVQConfig
from unidiff.program import run_program
from unidiff.tasks import Task, resolve
from unidiff.tasks.mix import Mix
from unidiff.tasks.puzzles import Puzzle
from unidiff.tasks.puzzles.judge import replay


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--task", required=True, help="a name, or several with commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=4096, help="of each task")
    parser.add_argument("--test-pictures", type=int, default=512, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    torch.set_num_threads(1)  # one thread gives the same weights on every run
    torch.manual_seed(settings.seed)
    found = resolve(settings.task)
    tasks = found.tasks if isinstance(found, Mix) else {settings.task: found}

    model = PatchVQ(PatchVQConfig(codebook_size=settings.codes))
    began = time.perf_counter()
    share, rest = divmod(settings.batch, len(tasks))
    shares = []
    for number, task in enumerate(tasks.values()):
        shares.append((pixels_of(pictures(task, "train", settings.pictures)), share + (number < rest)))
    train(model, shares, settings.steps, settings.lr, settings.seed)
    model.eval().save_pretrained(settings.out)
    saved = PatchVQ.from_pretrained(settings.out)
    metrics: dict[str, object] = {"steps": settings.steps, "seconds": round(time.perf_counter() - began, 1)}
    metrics |= {name: evaluate(saved, task, settings.test_pictures) for name, task in tasks.items()}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def pictures(task: Task, split: str, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: pictures of prompts and responses, in order."""
    found: list[np.ndarray] = []
    index = 0
    while len(found) < count:
        example = task.example(split, index)
        walks = [task.demonstration, task.best, getattr(task, "random_walk", task.best)]
        parts = [*example.prompt, *(part for walk in walks for part in walk(example) or ())]
        found += [np.asarray(part) for part in parts if not isinstance(part, str | Path)]
        index += 1
        if index > 100 and not found:
            raise SystemExit(f"error: {type(task).__name__} has no pictures")
    return np.stack(found[:count])


def evaluate(model: PatchVQ, task: Task, count: int) -> dict[str, float]:
    """PSNR and codes used; of puzzles also the shares of cells and boards that are read back right."""
    given = pixels_of(pictures(task, "test", count))
    ids = torch.cat([model.encode(chunk) for chunk in given.split(128)])
    decoded = torch.cat([model.decode(chunk) for chunk in ids.split(128)])
    error = float((decoded - given).square().mean())
    metrics = {"psnr": round(-10 * math.log10(error), 2), "codes_used": len(ids.unique())}
    return metrics | (_read_back(model, task, count) if isinstance(task, Puzzle) else {})


def _read_back(model: PatchVQ, task: Puzzle, count: int) -> dict[str, float]:
    games, states = [], []
    for i, example in enumerate(task.example("test", i) for i in range(count)):
        game = example.columns["game"]
        walk = (task.best, task.random_walk)[i % 2](example)
        texts = [part for part in walk[:-1] if isinstance(part, str)]
        games.append(game)
        states.append(replay(game, texts[: len(texts) - i // 2 % 3] or texts).state)
    drawn = np.stack([np.asarray(task.picture(game, state)) for game, state in zip(games, states)])
    again = to_pil(torch.cat([model.decode(model.encode(chunk)) for chunk in pixels_of(drawn).split(128)]))
    right = [task.read(g, image) == g.classes(s) for g, s, image in zip(games, states, again)]
    return {
        "boards_read_back": float(np.mean([one.all() for one in right])),
        "cells_read_back": float(np.mean([one.mean() for one in right])),
    }


if __name__ == "__main__":
    run_program(main)
