r"""GRPO on pictures from prompts: coloured shapes in GenEval's six tags, or your own prompts with your own scorers.

    accelerate launch recipes/text_to_image.py                            # shapes: minutes, on 2 CPU cores
    accelerate launch recipes/text_to_image.py --image_sampler maskgit --output_dir outputs/maskgit
    accelerate launch recipes/text_to_image.py --max_steps 0              # evaluate only
    accelerate launch recipes/text_to_image.py --config recipes/configs/text_to_image/mmada.yaml --model MODEL \
        --task.train prompts.jsonl --task.unified_reward http://host:18088

A prompt names shapes ("a photo of a red circle left of a blue square"), and the model draws a picture, token by token
out of masks. MaskGRPO's emerge sampler (2510.02880) commits tokens by chance, so that a group's pictures differ. A
strict verifier reads the pixels: all that is asked for, and nothing else; a soft one says how much of it. A picture's
log-probability is estimated at high ratios of masks, from `image_min_ratio` to all.

--help lists the settings; docs/tasks.md the tasks, and how to bring your own data.
"""

from pathlib import Path

from unidiff.config import with_defaults
from unidiff.program import run_program
from unidiff.run import RunConfig, run_recipe

Config = with_defaults(
    RunConfig,
    task="shapes",
    model=str(Path(__file__).resolve().parent / "base_tasks"),
    # rollouts
    num_prompts=8,
    num_generations=8,
    image_sampler="emerge",
    image_steps=12,
    # the estimate of a picture's log-probability, and the loss
    image_estimator="image_random",
    image_min_ratio=0.8,
    # optimizer
    max_steps=80,
    micro_batch_size=32,
    learning_rate=2e-4,
    eval_size=288,
)


def main() -> None:
    run_recipe(Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
