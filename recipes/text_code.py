"""GRPO on code that hidden unit tests judge: small functions, or AceCode, MBPP, HumanEval.

    accelerate launch recipes/text_code.py                                # small functions: minutes, on 2 CPU cores
    accelerate launch recipes/text_code.py --max_steps 0                  # evaluate only
    accelerate launch recipes/text_code.py --config recipes/configs/text_code/acecode.yaml --model MODEL
    accelerate launch recipes/text_code.py --max_steps 0 --task humaneval --model MODEL --eval_size 164

A prompt shows a signature and two examples ("write f ( x ) so that f ( 3 ) == 7 and f ( 5 ) == 11"), and the model
answers with one fenced block. Five other tests, which it never sees, run in the sandbox. The reward is twice the share
that passes, if the block has no syntax error, and half a point for that alone.

--help lists the settings; docs/tasks.md the tasks, and how to bring your own data; docs/scorers.md the sandbox.
"""

from pathlib import Path

from unidiff.config import with_defaults
from unidiff.program import run_program
from unidiff.run import RunConfig, run_recipe

Config = with_defaults(
    RunConfig,
    task="functions",
    model=str(Path(__file__).resolve().parent / "base_tasks"),
    # rollouts; tests of one part run while the next part is sampled
    num_prompts=8,
    num_generations=8,
    rollout_parts=2,
    text_order="confidence",
    # the estimate of a text's log-probability, and the loss
    text_estimator="fading_out",
    text_min_ratio=0.6,
    # optimizer
    max_steps=100,
    learning_rate=2e-4,
    eval_size=512,
)


def main() -> None:
    run_recipe(Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
