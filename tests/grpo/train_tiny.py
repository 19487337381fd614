"""Trains tiny models, once for each of some settings: what test_distributed runs in one process and in two.

torchrun --nproc_per_node 2 tests/grpo/train_tiny.py FOLDER '[["model", {"beta": 0.1}], ["other", {"epsilon": 0.1}]]'
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, reward
from unidiff.grpo.checkpoint import write_json
from unidiff.tasks import FrozenLake


@reward(on="text", weight=0.5)
def words(segments, **columns):
    return [float(s.tokens.sum() % 7) / 6 for s in segments]


@reward(on="image")
def bright(segments, **columns):
    return [float(s.pixels.mean()) / 255 for s in segments]


@reward(on="sequence", credit="both", weight=0.1)
def lost_now_and_then(segments, **columns):
    return [None if sum(len(s.tokens) for s in v.segments) % 3 == 0 else float(len(v.segments)) for v in segments]


def train(model_folder: str, folder: Path, settings: dict) -> None:
    """Leaves metrics, weights and held-out figures in the folder."""
    torch.set_num_threads(1)
    config = GRPOConfig(**{"output_dir": str(folder), **settings})
    model = UnifiedModel.from_pretrained(model_folder)
    trainer = GRPOTrainer(model, FrozenLake(), config, [words, bright, lost_now_and_then])
    trainer.train()
    held = trainer.held_out()
    everybody = trainer.accelerator.gather(torch.cat([p.detach().flatten() for p in model.parameters()])[None])
    assert bool((everybody == everybody[0]).all()), "the processes' weights differ"
    if trainer.accelerator.is_main_process:
        trainer.model.save_pretrained(folder / "model")
        costs = {way: one.compute.total.token_forwards for way, one in held.items()}
        write_json(folder / "held_out.json", {"costs": costs, **{way: one.figures for way, one in held.items()}})


def main(folder: str, several: str) -> None:
    """several: for each run the model's folder in `folder`, and settings, as JSON."""
    runs = json.loads(several)
    for i, (start, settings) in enumerate(runs):
        train(str(Path(folder) / start), Path(folder) / str(i), settings)
    process = Accelerator().process_index
    try:  # the same folder again: every process says why not, and none waits for another
        train(str(Path(folder) / runs[0][0]), Path(folder) / "0", runs[0][1])
    except ValueError as error:
        (Path(folder) / f"refused-{process}.txt").write_text(str(error))
    Accelerator().end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
