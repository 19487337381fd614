"""Train the image tokenizer of a native model on pictures of its tasks: FrozenLake boards, and coloured shapes.

    python tokenizers/native/train_image.py                       # boards; about a minute on one CPU core
    python tokenizers/native/train_image.py --out tokenizers/unified/image --codes 256 --steps 2400 --train-scenes 8192

Boards come from the train split, with the agent on any cell (start, goal and holes more often than chance, so that
every kind of tile is common). With scenes they are a quarter of each batch, and the rest are pictures of several shapes
anywhere. Evaluation is on boards of the test split, whose layouts are new, and on scenes that prompts ask for.
Simplifications: plain squared error, no perceptual or adversarial loss; pictures are crisp enough without.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unidiff.images import to_pil
from unidiff.images.patch_vq import CodebookEMA, PatchVQ, PatchVQConfig
from unidiff.program import run_program
from unidiff.tasks import FrozenLake
from unidiff.tasks.frozen_lake.board import Board, board_classes
from unidiff.tasks.frozen_lake.render import draw
from unidiff.tasks.shapes import scene
from unidiff.tasks.shapes.look import look
from unidiff.tasks.shapes.prompts import TAGS, all_rows, free_places, scene_for
from unidiff.tasks.shapes.verify import strict


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "image")
    parser.add_argument("--widths", type=int, nargs="+", default=PatchVQConfig().widths, help="one per halving")
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train-boards", type=int, default=4096)
    parser.add_argument("--train-scenes", type=int, default=0)
    parser.add_argument("--test-boards", type=int, default=1024)
    parser.add_argument("--test-scenes", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    torch.set_num_threads(1)  # one thread gives the same weights on every run
    torch.manual_seed(settings.seed)

    # written out, so that the task's defaults may change and these weights stay what they are
    task = FrozenLake(size=4, frozen_probability=0.75, min_distance=1, max_distance=4, tile=16)
    model = PatchVQ(PatchVQConfig(codebook_size=settings.codes, widths=tuple(settings.widths)))
    started = time.perf_counter()
    rendered = draw(boards(task, "train", settings.train_boards, settings.seed))
    few = settings.batch // 4 if settings.train_scenes else settings.batch
    shares = [(pixels_of(rendered), few)]
    if settings.train_scenes:
        shares.append((pixels_of(scenes(settings.train_scenes, settings.seed)), settings.batch - few))
    train(model, shares, settings.steps, settings.lr, settings.seed)
    seconds = time.perf_counter() - started
    model.eval().save_pretrained(settings.out)

    saved = PatchVQ.from_pretrained(settings.out)
    metrics = evaluate(saved, task, settings.test_boards, settings.seed)
    if settings.train_scenes:
        metrics |= evaluate_scenes(saved, settings.test_scenes, settings.seed)
        metrics |= {"train_scenes": settings.train_scenes}
    metrics |= {"parameters": sum(p.numel() for p in model.parameters()), "steps": settings.steps}
    metrics |= {"train_boards": settings.train_boards, "train_seconds": round(seconds, 1)}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def train(model: PatchVQ, shares: list[tuple[Tensor, int]], steps: int, lr: float, seed: int) -> None:
    """Minimises `PatchVQ.loss` with AdamW and a linear decay; codes are revived in the first two thirds.

    shares: sets of pictures [N, 3, H, W], float in [0, 1], and how many of each a batch holds.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    codes = CodebookEMA(model)
    for step in range(steps):
        drawn = [pixels[torch.randint(len(pixels), (count,), generator=generator)] for pixels, count in shares]
        loss, features, ids = model.loss(torch.cat(drawn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        codes.update(features, ids, generator, revive=3 * step < 2 * steps)
        if step % 100 == 0 or step + 1 == steps:
            print(f"step {step:5d}  loss {loss.item():.5f}  codes in batch {len(ids.unique())}", flush=True)


def boards(task: FrozenLake, split: str, count: int, seed: int) -> np.ndarray:
    """[count, size, size] cell classes: boards of a split, the agent anywhere."""
    rng = np.random.default_rng([seed, count])
    found = (task.example(split, index).board for index in range(count))
    return np.stack([board_classes(board, _agent(board, rng)) for board in found])


def _agent(board: Board, rng: np.random.Generator) -> tuple[int, int]:
    special = [board.start, board.goal, *sorted(board.holes)]
    if rng.random() < 0.5:
        return special[rng.integers(len(special))]
    row, column = rng.integers(board.size, size=2)
    return int(row), int(column)


def scenes(count: int, seed: int) -> np.ndarray:
    """[count, side, side, 3] uint8: pictures of three to six shapes of any kind and colour."""
    chance = random.Random(seed)
    kinds, colours = scene.KINDS, list(scene.COLOURS)
    pictures = []
    for _ in range(count):
        places = free_places(chance.randint(3, 6), chance)
        shapes = tuple(scene.Shape(chance.choice(kinds), chance.choice(colours), *place) for place in places)
        pictures.append(np.asarray(scene.draw(shapes)))
    return np.stack(pictures) if pictures else np.zeros((0, scene.SIDE, scene.SIDE, 3), np.uint8)


def pixels_of(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def evaluate(model: PatchVQ, task: FrozenLake, count: int, seed: int) -> dict[str, float]:
    """PSNR, use of the codes, boards read back right after encode and decode, and tokens that leak."""
    classes = boards(task, "test", count, seed)
    pixels = pixels_of(draw(classes))
    ids = torch.cat([model.encode(chunk) for chunk in pixels.split(128)])
    decoded = torch.cat([model.decode(chunk) for chunk in ids.split(128)])
    parsed = task.parse(np.stack([np.asarray(image) for image in to_pil(decoded)]))
    shares = torch.bincount(ids.flatten(), minlength=model.codebook_size).double() / ids.numel()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    changed, leaked = leak(model, classes, seed)
    return {
        "test_boards": count,
        "psnr": round(-10 * math.log10(float((decoded - pixels).square().mean())), 2),
        "boards_read_back": float((parsed == classes).all((1, 2)).mean()),
        "cells_read_back": float((parsed == classes).mean()),
        "codes_used": int((shares > 0).sum()),
        "perplexity": round(float(entropy.exp()), 1),
        "tokens_changed_by_a_move": changed,
        "tokens_leaked_by_a_move": leaked,
    }


def evaluate_scenes(model: PatchVQ, count: int, seed: int) -> dict[str, float]:
    """PSNR of scenes that prompts ask for, each tag alike, and the share of them that the strict verifier still takes
    for what the prompt asks for."""
    chance = random.Random(seed + 1)
    rows = {tag: all_rows(tag) for tag in TAGS}
    given = [chance.choice(rows[TAGS[i % len(TAGS)]]) for i in range(count)]
    drawn = [np.asarray(scene.draw(scene_for(row, chance))) for row in given]
    pixels = pixels_of(np.stack(drawn))
    ids = torch.cat([model.encode(chunk) for chunk in pixels.split(128)])
    decoded = torch.cat([model.decode(chunk) for chunk in ids.split(128)])
    return {
        "test_scenes": count,
        "scenes_psnr": round(-10 * math.log10(float((decoded - pixels).square().mean())), 2),
        "scenes_read_back": sum(map(strict, given, look(to_pil(decoded)))) / count,
        "codes_used_by_scenes": len(ids.unique()),
    }


def leak(model: PatchVQ, classes: np.ndarray, seed: int) -> tuple[float, float]:
    """Move the agent to another cell: mean tokens that change in the two cells, and outside of them."""
    rng = np.random.default_rng([seed, 1])
    moved = classes - classes % 2
    size = moved.shape[1]
    rows, columns = rng.integers(size, size=(2, len(moved)))
    moved[np.arange(len(moved)), rows, columns] += 1
    before, after = (torch.cat([model.encode(c) for c in pixels_of(draw(x)).split(128)]) for x in (classes, moved))
    cell = before.shape[1] // size
    touched = torch.from_numpy(moved != classes).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    changes = before != after
    return float((changes & touched).sum()) / len(moved), float((changes & ~touched).sum()) / len(moved)


if __name__ == "__main__":
    run_program(main)
