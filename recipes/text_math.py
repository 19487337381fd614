r"""GRPO on texts that end in an answer: a calculation with three numbers, or GSM8K, MATH, sudoku, reasoning-gym.

    accelerate launch recipes/text_math.py                                # countdown: minutes, on 2 CPU cores
    accelerate launch recipes/text_math.py --max_steps 0                  # evaluate only
    accelerate launch recipes/text_math.py --task reasoning_gym --task.dataset chain_sum --model MODEL
    accelerate launch recipes/text_math.py --config recipes/configs/text_math/gsm8k.yaml --model MODEL

A prompt asks for a number ("make 24 from 25 3 4"), and the model answers with one text, a calculation and an expression
("25 + 3 = 28 , 28 - 4 = 24 so ( 25 + 3 ) - 4"). It is sampled token by token (`text_block`). Rewards
judge each step of the calculation and the answer. The text's log-probabilities are MaskGRPO's estimate (2510.02880):
masks at ratios that fade out, from `text_min_ratio` to all, over the passes of a step.

--help lists the settings; docs/tasks.md the tasks, and how to bring your own data.
"""

from pathlib import Path

from unidiff.config import with_defaults
from unidiff.program import run_program
from unidiff.run import RunConfig, run_recipe

Config = with_defaults(
    RunConfig,
    task="countdown",
    model=str(Path(__file__).resolve().parent / "base_tasks"),
    # rollouts
    num_prompts=8,
    num_generations=16,
    text_block=1,  # token by token; confident-first order would make all samples begin alike
    # the estimate of a text's log-probability, and the loss
    text_estimator="fading_out",
    text_min_ratio=0.6,
    scale_rewards="none",  # do not amplify small differences in groups where no rollout succeeds
    # optimizer
    max_steps=80,
    num_iterations=2,
    micro_batch_size=64,
    learning_rate=3e-4,
    eval_size=512,
)


def main() -> None:
    run_recipe(Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
