"""The four recipes of one part, their presets, and any task in any recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.tables import each
from unidiff import reward
from unidiff.command_line import parse, ungrouped
from unidiff.config import build
from unidiff.run import RunConfig, run
from unidiff.settings_file import from_yaml
from unidiff.tasks import Rows
from unidiff.tasks.names import TASKS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("text_math", "text_code", "text_to_image", "image_edit")
PRESETS = sorted(path for name in RECIPES for path in (ROOT / "recipes/configs" / name).glob("*.yaml"))
TINY = {"max_steps": 1, "num_prompts": 2, "num_generations": 2, "rollout_parts": 1, "eval_size": 4, "threads": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_one_step(program, name, tmp_path, monkeypatch):
    words = [f"--{key}={value}" for key, value in TINY.items()]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words, "--output_dir", str(tmp_path / "run")])
    program(f"recipes/{name}.py").main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == summary["config"]["task"] and summary["headline"] == "success"
    assert 0 <= summary["base"]["success"] <= 1 and 0 <= summary["final"]["success"] <= 1
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["ratio_first_iteration_max_dev"] < 2e-5
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@each("path", PRESETS)
def test_presets_are_read(program, path):
    config = program(f"recipes/{path.parent.name}.py").Config
    made = parse(config, ["--config", str(path)])
    assert made.task in TASKS and made.dtype == "bfloat16"
    with pytest.raises(ValueError, match="unknown setting 'num_prompt'"):
        build(config, {**ungrouped(config, from_yaml(path)), "num_prompt": 1})


def test_published_values(program):
    """Those of MaskGRPO's scripts and of d1's, which the presets name as their source."""

    def read(name: str) -> dict:
        path = ROOT / "recipes/configs" / f"{name}.yaml"
        return parse(program(f"recipes/{path.parent.name}.py").Config, ["--config", str(path)]).to_dict()

    common = {"lora_rank": 128, "lora_alpha": 64.0, "learning_rate": 3e-6, "num_generations": 6, "text_length": 256}
    common |= {"text_steps": 128, "text_threshold": None, "text_temperature": 0.9}
    mask_grpo = common | {
        "sync_ref_every": 64,
        "num_iterations": 12,
        "beta": 0.01,
        "epsilon": 0.2,
        "text_block": 16,
        "text_min_ratio": 0.6,
    }
    d1 = common | {"num_iterations": 8, "beta": 0.04, "epsilon": 0.5, "text_block": 32}
    pictures = {"num_generations": 9, "num_iterations": 6, "image_steps": 12, "image_guidance": 3.0}
    unigrpo = {"num_iterations": 5, "learning_rate": 5e-5, "lr_schedule": "cosine", "max_steps": 50000}
    for name, expected in {
        "text_math/gsm8k": mask_grpo,
        "text_math/math500": mask_grpo,
        "text_code/acecode": mask_grpo | {"num_iterations": 6},
        "text_math/countdown": d1,
        "text_math/sudoku": d1 | {"text_temperature": 0.3},
        "text_code/diffucoder": {"num_generations": 10, "num_iterations": 2, "beta": 0.01, "text_steps": 256},
        "text_to_image/unigrpo": unigrpo | {"image_estimator": "random:start=uniform", "image_steps": 50},
        "text_math/unigrpo": unigrpo | {"text_estimator": "random:start=uniform", "text_steps": 512, "text_block": 64},
        "text_to_image/mmada": pictures | {"image_sampler": "emerge", "image_temperature": 0.9, "image_min_ratio": 0.8},
    }.items():
        written = read(name)
        assert {key: written[key] for key in expected} == expected, name


@reward(on="text")
def short(segments, **columns):
    return [1 / len(s.tokens) for s in segments]


@pytest.mark.slow
def test_resume_inside_an_epoch(model, tmp_path):
    """Five rows, two a step: epochs end inside steps, and a run that goes on has the prompts of one that never
    stopped."""

    def metrics(folder: str, *steps: int) -> list:
        own = copy.deepcopy(model)
        for number, most in enumerate(steps):
            task = Rows({"train": ROWS[:5], "test": ROWS[5:]}, prompt="{say}", rewards=[short])
            settings = {**TINY, "max_steps": most, "log_rollouts_every": 1, "lr_schedule": "constant"}
            run(RunConfig(output_dir=str(tmp_path / folder), resume=number > 0, quiet=True, **settings), task, own)
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]

    ROWS = [{"say": f"go {where}"} for where in ("left", "right", "up", "down", "up left", "up right")]
    whole = metrics("whole", 5)
    assert metrics("parts", 2, 3, 5) == whole


def test_settings_of_a_task(program):
    config = program("recipes/text_math.py").Config
    made = parse(config, ["--task.skill", "0.5", "--data.task.numbers=9"])
    assert made.task_options == {"skill": "0.5", "numbers": "9"}
    assert made.made_task().skill == 0.5 and made.made_task().numbers == 9
    lake = program("recipes/interleaved_reasoning.py").Config
    assert parse(lake, ["--board_size", "5"]).made_task().size == 5
    assert parse(lake, ["--task", "countdown"]).made_task().room == 24
    for words, message in (
        (["--task", "countdown", "--board_size", "5"], "board_size is a setting of frozen_lake"),
        (["--task.siz", "5"], "no setting 'siz'; did you mean 'size'"),
    ):
        with pytest.raises((SystemExit, ValueError), match=message):
            parse(lake, words)
    with pytest.raises(ValueError, match="unknown reward 'step'; did you mean 'steps'"):
        parse(config, ["--rewards", "step"]).made_task()
    with pytest.raises(ValueError, match="task is none"):
        RunConfig().made_task()
