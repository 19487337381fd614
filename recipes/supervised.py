"""Masked-diffusion supervised training of the native model on demonstrations. Makes recipes/base.

    python recipes/supervised.py --output_dir outputs/base            # about an hour on 2 CPU cores
    python recipes/supervised.py --init recipes/base --steps 100      # a continued run
    python recipes/supervised.py --pictures false --output_dir outputs/base-text     # responses of one text

The demonstrator walks partly towards the goal and partly by habit (see FrozenLake.walker_probabilities), so that what
is learnt is how to see, move and draw; where to go is left for reinforcement learning.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from unidiff import supervised
from unidiff.config import parse
from unidiff.families import native
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.program import run_program
from unidiff.sequence import Interleaved
from unidiff.tasks import FrozenLake

ROOT = Path(__file__).resolve().parent.parent
FROZEN = (0.75, 0.6, 0.9)  # chance that a cell is ice
TEXT_LENGTH = {True: 8, False: 32}  # tokens of the longest text: of a move, and of a whole solution


@dataclass
class Config(supervised.SupervisedConfig):
    """init: checkpoint to continue from; None = a fresh model on tokenizers/native. output_dir: where it is saved.
    save_every: steps between checkpoints. d_model, layers: size of a fresh model. pictures: false = demonstrations of
    one text, without pictures. max_seconds: end after so much training time, the learning rate falling with time
    instead of steps. The rest: SupervisedConfig."""

    init: str | None = None
    output_dir: str = "outputs/base"
    save_every: int = 500
    d_model: int = 128
    layers: int = 6
    pictures: bool = True
    max_seconds: float | None = None


def main() -> None:
    config = parse(Config, description=__doc__ or "")
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    model = start(config)
    began = time.perf_counter()
    rows = demonstrations(model, config.corpus, config.pictures)
    print(f"{len(rows)} demonstrations in {time.perf_counter() - began:.0f} s", flush=True)

    optimizers = supervised.optimizers(model, config)
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    start_training = time.perf_counter()
    with (out / "supervised.jsonl").open("a") as log:
        for step in range(config.steps):
            planned = config.steps
            if config.max_seconds is not None:
                elapsed = time.perf_counter() - start_training
                if elapsed >= config.max_seconds:
                    break
                planned = max(step + 1, round(step * config.max_seconds / max(elapsed, 1e-9))) if step else config.steps
            factor = supervised.lr_factor(step, planned, config.warmup, config.decay)
            for optimizer, rate in zip(optimizers, rates):
                optimizer.param_groups[0]["lr"] = rate * factor
            canvas, mask = supervised.batch(model, rows, config, step)
            losses = supervised.supervised_loss(model, canvas, mask, config.changed_weight)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step == config.steps - 1:
                line = {"step": step, **{k: round(v.item(), 4) for k, v in losses.items()}}
                line["seconds"] = round(time.perf_counter() - began, 1)
                print(line, flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
            if (step + 1) % config.save_every == 0:
                model.save_pretrained(out)
    model.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(asdict(config), indent=1) + "\n")


def demonstrations(model: UnifiedModel, count: int, pictures: bool = True) -> list[Interleaved]:
    """Walks over boards with few, some and many holes: more layouts to learn from than those of the task alone."""
    tasks = [FrozenLake(frozen_probability=p, pictures=pictures) for p in FROZEN]
    return [row for i, task in enumerate(tasks) for row in supervised.corpus(model, task, range(i, count, len(tasks)))]


def start(config: Config) -> UnifiedModel:
    if config.init is not None:
        return UnifiedModel.from_pretrained(config.init)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenizers/native/text")
    images = PatchVQ.from_pretrained(ROOT / "tokenizers/native/image").eval()
    text_length = TEXT_LENGTH[config.pictures]
    return native.build(
        tokenizer, images, text_length=text_length, d_model=config.d_model, layers=config.layers, seed=config.seed
    )


if __name__ == "__main__":
    run_program(main)
