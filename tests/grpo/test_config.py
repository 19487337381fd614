"""GRPOConfig: what it refuses, and with which words."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from tests.tables import each
from unidiff.command_line import parse
from unidiff.config import GROUPS
from unidiff.grpo.config import GRPOConfig
from unidiff.sampling.config import SamplerConfig
from unidiff.settings_text import help_text

WRONG = [
    ({"num_generations": 1}, "num_generations is 1; a group needs at least 2"),
    ({"num_prompts": 0}, "num_prompts is 0; it must be at least 1"),
    ({"num_iterations": 0}, "num_iterations is 0"),
    ({"micro_batch_size": 0}, "micro_batch_size is 0"),
    ({"eval_size": 0}, "eval_size is 0"),
    ({"max_steps": -1}, "max_steps is -1; it must be a number that is not negative"),
    ({"save_steps": -1}, "save_steps is -1"),
    ({"eval_steps": -1}, "eval_steps is -1"),
    ({"check_ratio_every": -1}, "check_ratio_every is -1"),
    ({"beta": -0.1}, "beta is -0.1"),
    ({"beta": math.nan}, "beta is nan"),
    ({"epsilon": -0.1}, "epsilon is -0.1"),
    ({"epsilon_high": -0.1}, "epsilon_high is -0.1; it must not be negative, or none for epsilon"),
    ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ({"text_weight": -1.0}, "text_weight is -1.0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be above 0"),
    ({"text_min_ratio": 1.5}, r"text_min_ratio is 1.5; it must be in \[0, 1\]"),
    ({"delta": 1.2}, "delta is 1.2; it must be above 1 \\+ epsilon_high"),
    ({"delta": 1.25, "epsilon_high": 0.28}, "delta is 1.25"),
    ({"greedy": True}, "greedy is true; greedy rollouts of a prompt are all the same"),
    ({"text_estimator": "fading"}, "text_estimator: estimator 'fading' is not known; .*did you mean 'fading_out'"),
    ({"image_estimator": "randm"}, "image_estimator: estimator 'randm' is not known; .*did you mean 'random'"),
    ({"loss_type": "drgrpo"}, "loss_type is 'drgrpo'; choose one of grpo, .*, rtb; did you mean 'dr_grpo'"),
    ({"assignment": "factorised"}, "assignment is 'factorised'; .*did you mean 'factorized'"),
    ({"scale_rewards": "groups"}, "scale_rewards is 'groups'; .*did you mean 'group'"),
    (
        {"lr_schedule": "constnt"},
        "lr_schedule is 'constnt'; choose one of linear, cosine, constant; did you mean 'constant'",
    ),
    ({"edit": "regions"}, "edit is 'regions'"),
    ({"text_temperature": 0.0}, "text_temperature is 0;"),
    ({"learning_rate": math.inf}, "learning_rate is inf; it must be a finite number"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf; it must be a finite number"),
    ({"max_grad_norm": math.nan}, "max_grad_norm is nan; it must be a finite number"),
    ({"max_steps": 2.5}, "max_steps is 2.5; it must be a whole number"),
    ({"seed": True}, "seed is True; it must be a whole number"),
    ({"resume": "no"}, "resume is 'no'; it must be true or false"),
    ({"text_weight": "1"}, "text_weight is '1'; it must be a number"),
    ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; it must be at least 0 and below 1"),
    ({"output_dir": None}, "output_dir is None; it must be a text"),
    ({"output_dir": "$NO_SUCH/run"}, r"output_dir is '\$NO_SUCH/run'; \$NO_SUCH is not known here"),
    ({"text_estimator": None}, "text_estimator is None; it must be a text"),
]


@each(("settings", "message"), WRONG)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)


def test_settings_at_their_limits():
    GRPOConfig(num_generations=2, max_steps=0, warmup_steps=0, save_steps=0, epsilon=0.0, max_grad_norm=math.inf)
    assert GRPOConfig(epsilon=0.1).clip_range == (0.1, 0.1)
    assert GRPOConfig(epsilon=0.1, epsilon_high=0.0).clip_range == (0.1, 0.0)


@each(
    ("words", "message"),
    [
        (["--num_generation", "4"], "unknown setting 'num_generation'; did you mean 'num_generations'"),
        (["--lr", "4"], "unknown setting 'lr'"),
        (["--assignement=joint"], "did you mean 'assignment'"),
        (["--num_generations", "1"], "num_generations is 1"),
        (["--loss_type", "gpro"], "loss_type is 'gpro'; choose one of grpo, bnpo, dapo, dr_grpo, gspo"),
        (["--beta", "much"], "beta is 'much'; it must be a number"),
        (["--learning_rate", "inf"], "learning_rate is 'inf'; it must be a finite number"),
        (["--beta", "nan"], "beta is 'nan'; it must be a finite number"),
        (["--text_estimator", "fading-out"], "did you mean 'fading_out'"),
        (["joint"], "expected --setting value, got 'joint'"),
    ],
)
def test_wrong_words_on_the_command_line(words, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        parse(GRPOConfig, words)


def test_yaml_and_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.dump({"assignment": "joint", "seed": 3, "delta": None, "text_threshold": 0.5}))
    config = parse(GRPOConfig, ["--config", str(path), "--seed", "4", "--resume"])
    assert (config.assignment, config.seed, config.delta, config.text_threshold) == ("joint", 4, None, 0.5)
    assert config.resume and not config.quiet


def test_sampler_settings_are_those_of_the_run():
    config = GRPOConfig(text_steps=5, edit="full", image_temperature=0.5)
    assert config.sampler() == SamplerConfig(text_steps=5, edit="full", image_temperature=0.5)
    assert config.sampler(greedy=True).greedy and not config.greedy


def test_every_setting_is_documented():
    fields = dataclasses.fields(GRPOConfig)
    assert all(f.metadata["help"] and f.metadata["group"] in GROUPS for f in fields)
    lines = help_text(GRPOConfig).split("\n")
    assert all(any(line.startswith(f"  --{f.name} ") for line in lines) for f in fields)
    for group in GROUPS:  # one screen
        assert len(help_text(GRPOConfig, topic=group).split("\n")) <= 40


@pytest.mark.parametrize("path", [Path("~/run"), "~/run", Path("$HOME") / "run"], ids=repr)
def test_the_output_directory_is_a_text_that_can_be_written_down(path, monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert json.loads(json.dumps(GRPOConfig(output_dir=path).to_dict()))["output_dir"] == "/me/run"


def test_free_settings_exist():
    assert {f.name for f in dataclasses.fields(GRPOConfig)} >= GRPOConfig.FREE | {GRPOConfig.GROWS}
    assert not GRPOConfig.FREE & {"seed", "max_steps", "learning_rate", "edit", GRPOConfig.GROWS}
