r"""GRPO on edits of a picture in words: coloured shapes, or your own pictures with a judge.

    accelerate launch recipes/image_edit.py                               # edit shapes: minutes, on 2 CPU cores
    accelerate launch recipes/image_edit.py --edit full --output_dir outputs/full
    accelerate launch recipes/image_edit.py --max_steps 0                 # evaluate only
    accelerate launch recipes/image_edit.py --config recipes/configs/image_edit/mmada_parallel.yaml --model MODEL \
        --task.train edits.jsonl --task.judge_url http://host:8000/v1

A prompt is a picture and an instruction ("make the blue square red"). The response starts as a copy of that picture.
`edit` says which of its tokens are drawn again: those that the model is least sure of (confidence), those in a given
box or mask or that a task finds (region), or all (full). All others stay bit-identical. One reward says how far the
target is reached, the other how much of the rest was left alone.

--help lists the settings; docs/tasks.md the tasks, and how to bring your own data.
"""

from pathlib import Path

from unidiff.config import with_defaults
from unidiff.program import run_program
from unidiff.run import RunConfig, run_recipe

Config = with_defaults(
    RunConfig,
    task="edit_shapes",
    model=str(Path(__file__).resolve().parent / "base_tasks"),
    # rollouts
    num_prompts=16,
    num_generations=8,
    edit="confidence",
    edit_share=0.4,
    image_steps=32,
    scale_rewards="none",
    # the estimate of a picture's log-probability, and the loss
    image_estimator="image_random",
    image_min_ratio=0.8,
    # optimizer
    max_steps=40,
    num_iterations=2,
    micro_batch_size=64,
    learning_rate=3e-4,
    eval_size=256,
)


def main() -> None:
    run_recipe(Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
