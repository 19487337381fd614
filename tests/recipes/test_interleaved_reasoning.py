"""The main recipe, end to end, on the tiny model: what it leaves behind, what it refuses, and how it survives kills."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest
import torch

from tests.covering import slow_after
from tests.tables import each
from unidiff import UnifiedModel
from unidiff.grpo.trainer import GRPOTrainer
from unidiff.run_folder import read_metrics

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "interleaved_reasoning.py"
SMALL = {"num_prompts": 2, "num_generations": 2, "max_rounds": 2, "text_steps": 3, "image_steps": 2, "edit": "random"}
SMALL |= {"edit_share": 0.2, "eval_size": 3, "max_steps": 2, "warmup_steps": 0, "threads": 1}

# The tiny model earns nothing from the task's own rewards, and so would learn nothing.
REWARDS = """
from unidiff import reward

@reward(on="image", weight=2.0)
def bright(segments, **columns):
    return [s.pixels.mean() / 255 for s in segments]

def parity(completions, completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]

@reward(on="text", required=True)
def vital(segments, **columns):
    return [None for _ in segments]
"""


@pytest.fixture(scope="module")
def recipe(program: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    before, threads = os.environ.get("ACCELERATE_USE_CPU"), torch.get_num_threads()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    yield program("recipes/interleaved_reasoning.py")
    torch.set_num_threads(threads)
    if before is None:
        del os.environ["ACCELERATE_USE_CPU"]


@pytest.fixture(scope="module")
def start(model: UnifiedModel, tmp_path_factory) -> Path:
    """The folder of the tiny model, with a module of rewards beside its files."""
    folder = tmp_path_factory.mktemp("start")
    model.save_pretrained(folder)
    (folder / "toy_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def words(start: Path) -> Callable[..., list[str]]:
    """words(folder, *more) -> a command line of a small run."""
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    small += ["--model", str(start), "--rewards", "toy_rewards:bright,toy_rewards:parity"]
    return lambda folder, *more: [*small, "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def run(recipe: ModuleType, words: Callable[..., list[str]], start: Path) -> Callable[..., Path]:
    """run(folder, *more) -> the folder, after a run in this process."""

    def call(folder: Path, *more: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(start)
            patch.setattr(sys, "argv", [str(RECIPE), *words(folder, *more)])
            recipe.main()
        return folder

    return call


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def timeless(folder: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in read_metrics(folder / "metrics.jsonl")]


# ---------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(run: Callable[..., Path], tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "finished", "--log_rollouts_every", "1", "--eval_steps", "1")


def test_summary(finished, start):
    summary = summary_of(finished)
    for side in ("base", "final"):
        assert summary[side]["success"] == summary[side]["greedy"]["success"]
        assert {"success", "image_exact", "format"} <= summary[side]["sampled"].keys()
    assert summary["rollout"]["token_forwards"] > 0 and summary["rollout"]["flops"] > 0
    assert summary["rollout"]["seconds"] > 0 and set(summary["rollout"]["phases"]) >= {"prompt", "text", "write_text"}
    assert summary["seconds"] > summary["seconds_training"] > 0 and summary["steps"] == 2
    assert summary["config"]["model"] == str(start) and summary["config"]["num_generations"] == 2


def test_files(finished, recipe):
    assert {p.name for p in finished.iterdir()} >= {"config.json", "metrics.jsonl", "summary.json", "report.html"}
    assert [m["step"] for m in read_metrics(finished / "metrics.jsonl")] == [0, 1]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    for gallery in ("before training", "training, step 1", "training, step 2", "after training"):
        assert gallery in page
    for panel in ("rewards of pictures", "rewards of whole responses", "groups without spread", "KL"):
        assert f"Curve: {panel}" in page
    assert [p.name for p in sorted((finished / "rollouts").iterdir())] == [
        "step-000001.safetensors",
        "step-000002.safetensors",
    ]
    assert not list(finished.rglob("*.draft"))


def test_the_model_loads_back(finished, start, model):
    trained = UnifiedModel.from_pretrained(finished / "model")
    kept = UnifiedModel.from_pretrained(start)
    changed = [not torch.equal(a, b) for a, b in zip(trained.state_dict().values(), kept.state_dict().values())]
    assert all(changed)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values()))


def test_results_are_printed(run, tmp_path, capsys):
    run(tmp_path / "run", "--max_steps", "1")
    out, _, page = capsys.readouterr().out.partition("look at ")
    assert "held-out prompts" in out and "success" in out and page.strip() == str(tmp_path / "run" / "report.html")
    assert "step 1/1" in out  # the progress display
    assert out.count("greedy") == 3 and "result" not in out  # before, after and change: no column is told twice


def test_evaluation_only(run, tmp_path, start):
    folder = run(tmp_path / "run", "--max_steps", "0", "--quiet")
    summary = summary_of(folder)
    assert summary["base"] == summary["final"] and summary["steps"] == 0 and summary["seconds_training"] == 0
    assert not (folder / "model").exists() and not (folder / "checkpoints").exists()
    assert "before training" in (folder / "report.html").read_text()


def test_resuming_a_finished_run_gives_its_results_again(run, finished):
    before, metrics = summary_of(finished), timeless(finished)
    run(finished, "--log_rollouts_every", "1", "--eval_steps", "1", "--resume", "--quiet")
    after = summary_of(finished)
    assert timeless(finished) == metrics
    assert after["final"] == before["final"] and after["base"] == before["base"] and after["config"]["resume"]


def test_rewards_by_name(run, finished, tmp_path):
    metrics = read_metrics(finished / "metrics.jsonl")[0]
    assert 0 < metrics["reward/bright"] < 1 and metrics["reward/parity"] <= 1 and "reward/progress" not in metrics
    own = run(tmp_path / "run", "--rewards", "none", "--max_steps", "1", "--quiet")  # the task's
    (metrics,) = read_metrics(own / "metrics.jsonl")
    assert "reward/bright" not in metrics and "reward/progress" in metrics


def test_rewards_are_found_where_the_user_is(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from unidiff import reward\n@reward\ndef f(segments): return [1.0] * len(segments)\n"
    )
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", "--rewards", "mine:f", "--max_steps", "0", "--quiet")


def test_settings_from_a_file(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("assignment: joint\nmax_steps: 1\nseed: 7\n")
    words = ["--config", str(path), "--quiet", "--max_steps", "0"]
    assert summary_of(run(tmp_path / "run", *words))["config"]["assignment"] == "joint"


# ---------------------------------------------------------------------------------------------- what it refuses


@each(
    ("more", "message"),
    [
        (["--assignmet", "joint"], "unknown setting 'assignmet'; did you mean 'assignment'?"),
        (["--modle", "x"], "unknown setting 'modle'; did you mean 'model'?"),
        (
            ["--assignment", "both"],
            "assignment is 'both'; choose one of joint, normalize_then_sum, factorized, segment",
        ),
        (["--num_generations", "1"], "num_generations is 1; a group needs at least 2"),
        (["--text_estimator", "fading"], "text_estimator: estimator 'fading' is not known"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--board_size", "9"], "size: expected 3 to 8 cells, got 9"),
        (["--board_size", "5"], "its cells do not fill the model's picture of 64 x 64 pixels"),
        (["--board_size", "5", "--tile", "16"], "the model embeds images of (8, 8) tokens, not of [(10, 10)]"),
        (["--image_tokenizer", "somewhere"], "takes no image_tokenizer"),
        (["--family", "mmda"], "family 'mmda' is not known"),
        (["--max_rounds", "40"], "tokens, 41 texts of up to 8 tokens and 40 images"),
        (["--eval_split", "exam"], "split: expected one of train, dev, test, got 'exam'"),
        (["--rewards", "no_module:f"], "no_module"),
        (["--rewards", "math:sqrt"], "mark the function with @reward"),
        (["--rewards", "sucess=2"], "unknown reward 'sucess'; did you mean 'success'?"),
        (["--rewards", "success=high"], "reward 'success=high': the weight 'high' is not a finite number"),
        (["--tracker", "notebook"], "notebook"),
        (["--threads", "-1"], "threads is -1; it must be at least 1, or none"),
        (["--threads", "0"], "threads is 0; it must be at least 1, or none"),
        (["--output_dir", str(RECIPE)], "interleaved_reasoning.py is a file, not a folder"),
        (["--output_dir", str(RECIPE / "run")], "interleaved_reasoning.py is a file, not a folder"),
        (["--output_dir", str(RECIPE.parent / "base")], "base holds README.md, config.json, image, … but no run"),
        (["--resume"], "does not exist, so nothing can be resumed"),
        (["--config", "missing.yaml"], "config file missing.yaml does not exist"),
    ],
)
def test_refusals(run, tmp_path, more, message):
    with pytest.raises(SystemExit) as refused:
        run(Path(tempfile.mkdtemp(dir=tmp_path)) / "run", "--quiet", *more)
    assert str(refused.value).startswith("error: ") and message in str(refused.value)


def test_a_mended_setting_may_use_the_same_folder(run, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--quiet", "--eval_split", "exam", "--max_steps", "0")
    run(tmp_path / "run", "--quiet", "--max_steps", "0")


def test_a_folder_that_holds_another_run(run, finished):
    with pytest.raises(SystemExit, match="holds another run"):
        run(finished)
    with pytest.raises(SystemExit, match="cannot be resumed with other settings: seed was 0, is 1"):
        run(finished, "--resume", "--seed", "1")
    assert summary_of(finished)["steps"] == 2


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_finished_run_is_extended_with_the_settings_of_its_folder(recipe, start, copy, finished, monkeypatch):
    monkeypatch.syspath_prepend(start)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--resume", "--output_dir", str(copy), "--max_steps", "3"])
    recipe.main()
    before, after = summary_of(finished), summary_of(copy)
    assert after["steps"] == 3 and after["base"] == before["base"]
    changed = {k for k, v in after["config"].items() if v != before["config"][k]}
    assert changed - {"resume"} == {"max_steps", "output_dir"}


@pytest.mark.parametrize("content", slow_after(2, [None, '{"greedy": ', "", "[]", '{"success": 0.5}']))
def test_the_figures_before_training_are_found_again(run, copy, finished, content):
    (copy / "base.json").unlink()
    if content is not None:
        (copy / "base.json").write_text(content)
    run(copy, "--quiet", "--resume", "--log_rollouts_every", "1", "--eval_steps", "1")
    assert summary_of(copy)["base"] == summary_of(finished)["base"]
    assert summary_of(copy)["final"] == summary_of(finished)["final"]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(run, words, finished, tmp_path):
    folder = run(tmp_path / "run", "--quiet", "--save_steps", "1", "--log_rollouts_every", "1", "--eval_steps", "1")
    for name in ("model.safetensors", "optimizer.bin"):
        path = folder / "checkpoints" / "step-000002" / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=rf"step-000002.{name} is damaged; it is kept as step-000002\.damaged"):
            run(folder, "--quiet", "--resume", "--log_rollouts_every", "1", "--eval_steps", "1")
        same_results(folder, finished)


def test_a_full_disk(run, finished, small_disk):
    """The message names the file and the cause; the checkpoint before stays, and with room the run goes on from it."""
    size = sum(p.stat().st_size for p in (finished / "checkpoints").rglob("*"))
    words = ("--quiet", "--save_steps", "1", "--log_rollouts_every", "0", "--eval_steps", "1")
    disk = small_disk(int(1.6 * size))
    message = (
        r"^error: .*step-000002 could not be written: .* are free on its disk\)\nMend it and go on with .*--resume"
    )
    with pytest.raises(SystemExit, match=message):
        run(disk, *words)
    assert [p.name for p in (disk / "checkpoints").iterdir()] == ["step-000001"] and not list(disk.rglob("*.draft"))
    small_disk(8 * size)
    run(disk, *words, "--resume")
    same_results(disk, finished)


def test_a_tracker_whose_package_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    for tracker, package in (("wandb", "unidiff[tracking]"), ("all", "unidiff[tracking]"), ("comet_ml", "comet-ml")):
        with pytest.raises(SystemExit) as refused:
            run(tmp_path / "run", "--tracker", tracker)
        assert refused.value.code == f'error: tracker {tracker} is not installed: pip install "{package}"'
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_an_evaluation(run, tmp_path):
    run(tmp_path / "run", "--quiet", "--max_steps", "0")
    with pytest.raises(SystemExit, match="holds another run"):
        run(tmp_path / "run", "--quiet")


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "image/model.safetensors", "config.json"])
def test_a_checkpoint_that_lacks_files(run, tmp_path, model, missing):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(SystemExit, match=missing):
        run(tmp_path / "run", "--model", str(tmp_path / "model"))


def test_a_required_reward_that_fails(run, tmp_path):
    with pytest.raises(SystemExit, match=r"error: reward 'vital' is required[\s\S]*py --resume --output_dir"):
        run(tmp_path / "run", "--rewards", "toy_rewards:vital", "--quiet")
    assert (tmp_path / "run" / "checkpoints" / "step-000000" / "progress.json").is_file()


def test_rewards_by_name_with_weights(run, tmp_path):
    words = ["--rewards", "toy_rewards:bright=0.5,success=2", "--max_steps", "1", "--quiet"]
    folder = run(tmp_path / "run", *words)
    (metrics,) = read_metrics(folder / "metrics.jsonl")
    assert {k for k in metrics if k.startswith("reward/")} == {"reward/bright", "reward/success"}
    assert summary_of(folder)["config"]["rewards"] == ["toy_rewards:bright=0.5", "success=2"]


def test_help(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run", "--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    assert "accelerate launch recipes/interleaved_reasoning.py" in out and "--text_estimator fading_out" in out


# ---------------------------------------------------------------------------------------------- kills

LONG = ("--max_steps", "8", "--save_steps", "2", "--eval_steps", "4", "--quiet")


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "unbroken", *LONG)


def ended_by(
    number: int, words: list[str], start: Path, folder: Path, lines: int, launcher: Sequence[str] = (sys.executable,)
) -> tuple[int, str]:
    """Starts a run as a user does, sends it and its launcher a signal once it has written so many lines of metrics;
    its exit code, and what it printed."""
    process = subprocess.Popen(
        [*launcher, str(RECIPE), *words],
        env=surroundings(start),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(read_metrics(folder / "metrics.jsonl")) < lines:
        time.sleep(0.002)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def surroundings(start: Path) -> dict[str, str]:
    """The environment of a run started as a user does."""
    paths = os.pathsep.join(filter(None, (str(start), os.environ.get("PYTHONPATH"))))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PATH": programs}


def same_results(first: Path, second: Path) -> None:
    assert timeless(first) == timeless(second)
    weights = [(f / "model" / "model.safetensors").read_bytes() for f in (first, second)]
    assert weights[0] == weights[1]
    summaries = [summary_of(f) for f in (first, second)]
    assert all(summaries[0][side] == summaries[1][side] for side in ("base", "final"))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(run, words, start, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert ended_by(signal.SIGKILL, words(folder, *LONG), start, folder, lines=3)[0] == -signal.SIGKILL
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert 3 <= done < 8 and not (folder / "summary.json").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lr"')  # a line that the kill cut off
    run(folder, *LONG, "--resume")
    same_results(folder, unbroken)


def told_to_go_on(out: str, *command: str) -> list[str]:
    """The words of the command that a stopped run prints last: these, and nothing but its folder."""
    hint = shlex.split(out.splitlines()[-1].partition("; go on with ")[2])
    assert hint[:-1] == [*command, str(RECIPE), "--resume", "--output_dir"]
    return hint


@pytest.mark.slow
def test_an_interrupted_run_saves_what_it_has_and_goes_on(run, recipe, start, unbroken, tmp_path, monkeypatch, capsys):
    """By the command that it prints last."""
    folder, steps, step = tmp_path / "a run", [], GRPOTrainer.step

    def interrupted(trainer: GRPOTrainer, number: int) -> Any:
        steps.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(GRPOTrainer, "step", interrupted)
        run(folder, *LONG)
    assert ended.value.code == 130 and steps == [0, 1, 2] == [m["step"] for m in timeless(folder)]
    last = sorted((folder / "checkpoints").iterdir())[-1]
    assert json.loads((last / "progress.json").read_text())["step"] == 3
    hint = told_to_go_on(capsys.readouterr().out, sys.executable)
    monkeypatch.syspath_prepend(start)
    monkeypatch.setattr(sys, "argv", hint[1:])
    recipe.main()
    same_results(folder, unbroken)


@pytest.mark.slow
def test_an_interrupted_launcher_says_how_to_go_on(words, start, unbroken, tmp_path):
    """Whatever it prints itself when it is interrupted."""
    folder, launcher = tmp_path / "a run", ("accelerate", "launch", "--cpu")
    _, out = ended_by(signal.SIGINT, words(folder, *LONG), start, folder, lines=1, launcher=launcher)
    assert 1 <= len(read_metrics(folder / "metrics.jsonl")) < 8
    command = told_to_go_on(out, *launcher)
    subprocess.run(command, env=surroundings(start), check=True, stdout=subprocess.DEVNULL)
    same_results(folder, unbroken)
