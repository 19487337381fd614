"""Trains the tiny model once for each of some settings: what test_distributed runs in one process and in two.

torchrun --nproc_per_node 2 tests/grpo/train_tiny.py MODEL FOLDER '[{"loss_type": "dapo"}, {"scale_rewards": "batch"}]'

SHARDED=FSDP or DEEPSPEED in the environment: with FSDP2 or ZeRO-2, which accelerate would use on GPUs only, so it is
told to afterwards. The processes then make different numbers of backward passes.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, reward
from unidiff.files import write_json
from unidiff.tasks import FrozenLake
from unidiff.tasks.order import endless
from unidiff.tasks.task import Place

COMMON = {
    "num_prompts": 4,
    "num_generations": 2,
    "max_rounds": 2,
    "text_steps": 3,
    "text_threshold": None,
    "image_steps": 2,
    "edit": "random",
    "edit_share": 0.2,
    "micro_batch_size": 3,
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "max_steps": 2,
    "eval_size": 5,
    "check_ratio_every": 1,
    "dtype": "float64",  # see the fixture `exact`
}


@reward(on="text", weight=0.5)
def words(segments, **columns):
    return [float(s.tokens.sum() % 7) / 6 for s in segments]


@reward(on="image")
def bright(segments, **columns):
    return [float(s.pixels.mean()) / 255 for s in segments]


@reward(on="sequence", credit="both", weight=0.1)
def lost_now_and_then(segments, **columns):
    return [None if sum(len(s.tokens) for s in v.segments) % 3 == 0 else float(len(v.segments)) for v in segments]


FIRST = {endless(Place(0, step, 0, step)) for step in range(COMMON["max_steps"])}


def on_first_prompt(name, function):
    """A reward that says the same of all rollouts but those of a step's first prompt: of the first process."""

    def judged(segments, **columns):
        return [v if s.task.index in FIRST else 0.5 for s, v in zip(segments, function(segments))]

    return reward(judged, on=name, name=name)


REWARDS = {
    "all": [words, bright, lost_now_and_then],
    "first prompt": [on_first_prompt("text", words.function), on_first_prompt("image", bright.function)],
    "none": [reward(lambda segments, **columns: [0.5 for _ in segments], on="text", name="equal")],
}


def accelerator_of(sharded: str) -> Accelerator:
    accelerator = Accelerator()
    if sharded == "DEEPSPEED":
        importlib.import_module("deepspeed").init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        accelerator.deepspeed_engine_wrapped = None
        accelerator.state.deepspeed_plugins = plugin = DeepSpeedPlugin(zero_stage=2)
        plugin.select(_from_accelerator_state=True)
    elif sharded == "FSDP":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
    if sharded:
        accelerator.state.distributed_type = DistributedType[sharded]
        PartialState._shared_state["distributed_type"] = DistributedType[sharded]
    return accelerator


def stop_after_a_step(whole: Path, folder: Path) -> None:
    """Makes the folder what a run's would be, had it been stopped in its second step."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    (folder / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    (folder / "checkpoints" / "step-000001").symlink_to(whole.resolve() / "checkpoints" / "step-000001")


def train(model_folder: str, folder: Path, settings: dict) -> None:
    """Leaves metrics, weights and held-out figures in the folder. settings: of GRPOConfig, beside the common ones; and
    dtype, rewards: a name of REWARDS, start: the name of a model's folder beside the given one, goes_on: the name of an
    earlier run's folder, whose second step is made again from its checkpoint."""
    torch.set_num_threads(1)
    settings = {"output_dir": str(folder), **COMMON, **settings}
    dtype, rewards = getattr(torch, settings.pop("dtype")), REWARDS[settings.pop("rewards", "all")]
    start = Path(model_folder).parent / settings.pop("start", Path(model_folder).name)
    sharded = os.environ.get("SHARDED", "")
    accelerator = accelerator_of(sharded)
    if "goes_on" in settings:
        whole = folder.with_name(settings.pop("goes_on"))
        if accelerator.is_main_process:
            stop_after_a_step(whole, folder)
        accelerator.wait_for_everyone()
        settings["resume"] = True
    if sharded:
        settings["micro_batch_size"] += accelerator.process_index
    config = GRPOConfig(**settings)
    model = UnifiedModel.from_pretrained(start, dtype=dtype)
    trainer = GRPOTrainer(model, FrozenLake(), config, rewards, accelerator=accelerator)
    trainer.train()
    held = trainer.held_out()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybody = trainer.accelerator.gather(flat[None])
    assert bool((everybody == everybody[0]).all()), "the processes' weights differ"
    trainer.save_model(folder / "model")
    if trainer.accelerator.is_main_process:
        costs = {way: one.compute.total.token_forwards for way, one in held.items()}
        write_json(folder / "held_out.json", {"costs": costs, **{way: one.figures for way, one in held.items()}})


def main(model_folder: str, folder: str, several: str) -> None:
    for i, settings in enumerate(json.loads(several)):
        train(model_folder, Path(folder) / settings.pop("folder", str(i)), settings)
    process = Accelerator().process_index
    try:  # the same folder again: every process says why not, and none waits for another
        train(model_folder, Path(folder) / "0", json.loads(several)[0])
    except ValueError as error:
        (Path(folder) / f"refused-{process}.txt").write_text(str(error))
    Accelerator().wait_for_everyone()
    Accelerator().end_training()
    if os.environ.get("SHARDED"):
        # DTensor's caches keep gloo's threads alive after the process group is gone. One that releases a tensor while
        # Python shuts down aborts the process ("terminate called without an active exception"): so it does not.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
