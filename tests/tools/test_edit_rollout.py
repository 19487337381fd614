"""The tool as a user runs it: its three commands, what they write, and what they say when something is wrong."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.tables import each
from unidiff import SamplerConfig
from unidiff.files import write_json
from unidiff.grpo.rollout_file import RolloutBatch, save_rollouts
from unidiff.model import UnifiedModel
from unidiff.report.gallery import mixed_first, mixed_groups, records, successes
from unidiff.scorers.pictures import pixels_of, psnr
from unidiff.tasks import FrozenLake

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def tool(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("tools/edit_rollout.py")


@pytest.fixture(scope="module")
def run_folder(model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the tiny model, settings and a line of metrics."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    model.save_pretrained(folder / "model")
    settings = {"edit": "random", "edit_share": 0.25, "image_steps": 8, "max_rounds": 2, "assignment": "segment"}
    write_json(folder / "config.json", {**settings, "board_size": 4, "scale_rewards": "none", "rewards": None})
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    return folder


@pytest.fixture
def run(tool: ModuleType, tmp_path: Path) -> Callable[..., dict]:
    """run(*words) -> the data that the tool wrote; the page is beside it."""

    def call(*words: str, output: str = "out") -> dict:
        page = tool.main([*words, "--no_open", "--json", "--output", str(tmp_path / output)])
        assert page == tmp_path / output / "page.html" and page.read_text().startswith("<!DOCTYPE html>")
        return json.loads((tmp_path / output / "rollouts.json").read_text())

    return call


def rollouts(data: dict) -> list[dict]:
    return [r for group in data["galleries"].values() for r in group]


def pictures(record: dict) -> list[dict]:
    return [s for s in record["segments"] if s["modality"] == "image" and not s["prompt"]]


def test_a_run_folder_gives_its_model_and_its_settings(run, run_folder, tmp_path) -> None:
    data = run("--checkpoint", str(run_folder), "--index", "0,1", "--png", "--gif")
    assert list(data["galleries"]) == ["test prompt 0", "test prompt 1"] and len(rollouts(data)) == 8
    for one in rollouts(data):
        assert (one["settings"]["edit"], one["settings"]["max_rounds"]) == ("random", 2)
        assert one["assignment"] == "segment" and one["figures"]["success"] in (0, 1)
        for segment in (s for s in one["segments"] if not s["prompt"]):
            assert segment["advantage"] == segment["advantages"]["segment"] and segment["trace"] is not None
    drawn = [r for r in rollouts(data) if pictures(r)]
    assert drawn and all(sum(p["edited"]) == 16 for r in drawn for p in pictures(r))
    strips = list((tmp_path / "out" / "strips").glob("*.png"))
    assert len(strips) == sum(len(pictures(r)) for r in drawn)
    assert len(list((tmp_path / "out" / "animations").glob("*.gif"))) == len(drawn)


def test_the_same_seed_gives_the_same_page(run, run_folder, tmp_path) -> None:
    words = ("--checkpoint", str(run_folder), "--index", "3", "--num_generations", "2")
    first, second = run(*words, output="a"), run(*words, output="b")
    tokens = [[[s["tokens"] for s in r["segments"]] for r in rollouts(d)] for d in (first, second)]
    assert tokens[0] == tokens[1]
    other = rollouts(run(*words, "--seed", "1", output="c"))
    assert tokens[0] != [[s["tokens"] for s in r["segments"]] for r in other]


def test_your_own_picture_text_and_box(run, run_folder, tmp_path, capsys) -> None:
    FrozenLake().example("test", 5).prompt[1].resize((200, 200)).save(tmp_path / "board.png")
    words = ["--checkpoint", str(run_folder), "--image", str(tmp_path / "board.png"), "--prompt", "find the goal"]
    data = run(*words, "--edit", "region", "--box", "2,1,3,3", "--num_generations", "8")
    said = capsys.readouterr().out
    assert "200 × 200 pixels, shown to the model at 64 × 64; its tokens read back at " in said
    assert data["facts"]["read back at"] in said and " dB (PSNR" in said
    assert list(data["galleries"]) == ["your prompt"]
    drawn = [p for r in rollouts(data) for p in pictures(r)]
    assert drawn, "no rollout drew a picture: choose another seed"
    for picture in drawn:
        assert [i for i, e in enumerate(picture["edited"]) if e] == [2 * 8 + 1, 2 * 8 + 2]
    assert not any(s["rewards"] or s["advantages"] for r in rollouts(data) for s in r["segments"])
    assert rollouts(data)[0]["segments"][0]["text"] == "find the goal"


def test_saved_rollouts(run, run_folder, model, task, tool, tmp_path) -> None:
    config = tool.Config()
    prompts = tool.task_prompts(config, task, range(5))
    settings = SamplerConfig(edit="random", max_rounds=1, image_steps=2)
    batch, _ = tool.sample(model, task, prompts, settings, task.region, 4, config, {})
    batch.titles[3] = EVIL
    path = run_folder / "rollouts" / "step-000040.safetensors"
    save_rollouts(path, batch)
    one = rollouts(run("--rollouts", str(path), "--sample", "3", output="one"))
    assert [r["title"] for r in one] == ["sample 3"]
    tokens = [s.tokens.tolist() for s in batch.rollouts[3].sequence]
    assert [s["tokens"] for s in one[0]["segments"]] == tokens
    advantages = [float(a) for a in batch.routed.advantage_BS[3][: len(one[0]["segments"]) - 2]]
    assert [s["advantage"] for s in one[0]["segments"][2:]] == pytest.approx(advantages)
    html = (tmp_path / "one" / "page.html").read_text()
    assert EVIL not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert len(rollouts(run("--rollouts", str(path), output="many"))) == 16  # of 20, and the page says so
    page = (tmp_path / "many" / "page.html").read_text()
    assert "16 of 20" in page and len(page) < 5e6


def test_compare_keeps_prompt_and_noise(run, run_folder) -> None:
    edits = ["region", "confidence", "random", "full"]
    data = run("--checkpoint", str(run_folder), "--index", "0,1", "--compare", ",".join(edits))
    assert [c["title"] for c in data["comparisons"]] == ["test prompt 0", "test prompt 1"]
    for compared in data["comparisons"]:
        made = compared["rollouts"]
        assert list(made) == edits and len({r["key"] for r in made.values()}) == 1
        assert [r["settings"]["edit"] for r in made.values()] == edits
        # Until the first picture nothing differs.
        assert len({json.dumps(r["segments"][:3][2]["tokens"]) for r in made.values()}) == 1


def test_the_shipped_model_opens_a_page(tool, tmp_path, monkeypatch, model) -> None:
    opened: list[str] = []
    monkeypatch.setattr(tool.webbrowser, "open", opened.append)
    monkeypatch.chdir(tmp_path)
    if not (tool.BASE / "config.json").is_file():
        monkeypatch.setattr(tool, "BASE", tmp_path / "base")
        model.save_pretrained(tool.BASE)
    page = tool.main(["--index", "0", "--num_generations", "1"])
    assert opened == [page.resolve().as_uri()] and page == Path("outputs/edits/page.html")


def test_settings_of_the_sampler(run, run_folder) -> None:
    sampler = ("--sampler", "image_steps=3,greedy=true,edit_share=0.5")
    data = run("--checkpoint", str(run_folder), "--index", "0", "--num_generations", "1", *sampler)
    settings = rollouts(data)[0]["settings"]
    assert (settings["image_steps"], settings["greedy"], settings["edit_share"]) == (3, True, 0.5)


TASK = """
import numpy as np
from PIL import Image
from unidiff import reward
from unidiff.tasks import Example, Task

@reward(on="text")
def short(segments, most, **columns):
    return [float(len(s.tokens) <= m) for s, m in zip(segments, most)]

class Colours(Task):
    def example(self, split, index):
        picture = Image.new("RGB", (64, 64), (40 * index, 90, 90))
        return Example(["find the goal " + "<script>alert(1)</script>", picture], {"most": 4})
    def rewards(self):
        return (short,)
    def region(self, text, grid):
        return np.eye(*grid, dtype=bool)
    def measure(self, rows, examples):
        return {"success": np.array([float(len(row) > 1) for row in rows])}

ready, number = Colours(), 3
def needs(size):
    return Colours()
"""


@pytest.fixture
def colours(tmp_path, monkeypatch) -> None:
    (tmp_path / "colours.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colours", raising=False)


@pytest.mark.parametrize("name", ["Colours", "ready"])
def test_a_task_of_your_own(run, run_folder, colours, name, tmp_path) -> None:
    data = run("--checkpoint", str(run_folder), "--task", f"colours:{name}", "--index", "2,5", "--edit", "region")
    assert list(data["galleries"]) == ["test prompt 2", "test prompt 5"] and len(rollouts(data)) == 8
    for one in rollouts(data):
        segments = [s for s in one["segments"] if not s["prompt"]]
        assert one["figures"]["success"] == float(len(segments) > 1)
        texts = [s for s in segments if s["modality"] == "text"]
        assert all([r["name"] for r in s["rewards"]] == ["short"] for s in texts)
        assert all(s["rewards"][0]["value"] == float(len(s["tokens"]) <= 4) for s in texts)
        assert all(p["edited"] == [i % 9 == 0 for i in range(64)] for p in pictures(one))  # the diagonal
    assert EVIL not in (tmp_path / "out" / "page.html").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colours:needs", "task: task 'colours:needs' needs a setting: --task.size VALUE"),
        ("colours:number", "task: 'colours:number' is a int; it must be a Task"),
        ("colours:Colors", "task: .*Colors"),
        ("colors:Colours", "task: .*No module named 'colors'"),
        ("colours", "task: unknown task 'colours'"),
    ],
)
def test_a_task_that_cannot_be_had(tool, run_folder, colours, name, message) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main(["--checkpoint", str(run_folder), "--task", name, "--no_open"])


def test_a_run_of_texts_gets_its_task_and_its_rewards_by_name(tool) -> None:
    config = tool.Config()
    assert tool.task_of(config, {"pictures": False, "board_size": 5}) == FrozenLake(size=5, pictures=False)
    task = tool.task_of(config, {})
    assert task == FrozenLake()
    named = tool.rewards_of(config, {"rewards": ["success=0.25", "legal_move"]}, task)
    assert [(r.name, r.weight) for r in named] == [("success", 0.25), ("legal_move", 0.3)]


@each(
    ("words", "message"),
    [
        (["--compare", "region,all"], "compare is 'region,all'; name some of"),
        (["--box", "2,1,3"], "box is .* it must be 4 values"),
        (["--box", "2,1,2,3"], "needs 0 <= top < bottom"),
        (["--box", "2,1,3,9", "--sampler", "max_rounds=4"], "does not fit a grid"),
        (["--box", "2,1,3,3", "--edit", "full"], "box says what to edit, and so does edit=full"),
        (["--image", "nothing.png"], r"image: nothing\.png does not exist"),
        (["--image", "."], r"image: \. is not a file"),
        (["--sample", "99"], "sample 99 does not exist"),
        (["--sampler", "image_step=3"], "did you mean 'image_steps'"),
        (["--rollouts", "nothing.safetensors"], "nothing.safetensors does not exist"),
        (["--rollouts", "a", "--edit", "full", "--prompt", "x"], "rollouts opens a file, edit and prompt would sample"),
        (["--num_generations", "0"], "num_generations is 0"),
        (["--index", ""], "index is empty"),
        (
            ["--rewards", "json:dumps", "--index", "0"],
            "rewards: reward 'json:dumps': <function .* is not a reward",
        ),
        (["--rewards", "sucess"], "unknown reward 'sucess'; did you mean 'success'"),
    ],
)
def test_mistakes_are_named(tool, run_folder, tmp_path, words, message) -> None:
    given = ["--checkpoint", str(run_folder), *words, "--no_open", "--output", str(tmp_path)]
    if "2,1,3,9" in words:
        given += ["--num_generations", "8"]
    with pytest.raises(SystemExit, match=message):
        tool.main(given)
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_is_no_picture_and_a_run_without_a_model(tool, run_folder, tmp_path) -> None:
    (tmp_path / "board.png").write_text("no picture")
    with pytest.raises(SystemExit, match="is not a picture that can be read"):
        tool.main(["--checkpoint", str(run_folder), "--image", str(tmp_path / "board.png"), "--no_open"])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="has no model/ yet"):
        tool.main(["--checkpoint", str(tmp_path), "--no_open"])


def test_a_file_of_another_model_does_not_fit(tool, run_folder, model, task, tmp_path) -> None:
    config = tool.Config(index=(0,))
    batch, _ = tool.sample(
        model, task, tool.task_prompts(config, task, (0,)), SamplerConfig(edit="full"), task.region, 2, config, {}
    )
    batch.fits["text"] = "0" * 64
    save_rollouts(tmp_path / "a.safetensors", batch)
    with pytest.raises(SystemExit, match="do not fit this checkpoint: its text tokenizer is another one"):
        tool.main(["--rollouts", str(tmp_path / "a.safetensors"), "--checkpoint", str(run_folder), "--no_open"])


@pytest.fixture
def saved(tool, model, task, tmp_path):
    """saved(began) -> a file in a run of no model, which began with the given one."""
    config = tool.Config(index=(0,))
    prompts, settings = tool.task_prompts(config, task, (0,)), SamplerConfig(edit="full", max_rounds=1)
    batch, _ = tool.sample(model, task, prompts, settings, task.region, 2, config, {})

    def make(began: str) -> Path:
        batch.config["model"] = began
        path = tmp_path / "project" / "outputs" / "run" / "rollouts" / "step-000001.safetensors"
        save_rollouts(path, batch)
        return path

    return make


def test_a_path_that_the_run_knows_is_relative_to_a_folder_above_it(run, saved, model, tmp_path, monkeypatch) -> None:
    model.save_pretrained(tmp_path / "project" / "models" / "tiny")
    path = saved("models/tiny")
    monkeypatch.chdir(tmp_path)  # which is not where the run was started
    assert len(rollouts(run("--rollouts", str(path)))) == 2
    monkeypatch.chdir(path.parent)
    assert len(rollouts(run("--rollouts", path.name, output="again"))) == 2


def test_a_file_without_a_model_to_decode_it(run, tool, saved, model, tmp_path, monkeypatch) -> None:
    path = saved("models/gone")
    model.save_pretrained(tmp_path / "elsewhere")
    other = tmp_path / "shipped"
    model.save_pretrained(other)
    monkeypatch.setattr(tool, "BASE", other)
    assert len(rollouts(run("--rollouts", str(path)))) == 2  # the shipped model fits
    fits = tool.fingerprint
    monkeypatch.setattr("unidiff.grpo.rollout_file.fingerprint", lambda m: {**fits(m), "text": "another"})
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--rollouts", str(path), "--no_open"])
    words = str(stopped.value)
    assert words.startswith("error: checkpoint: name one that") and "step-000001.safetensors fits" in words
    assert "began with 'models/gone', which is not here" in words and "its text tokenizer is another one" in words
    monkeypatch.undo()
    assert len(rollouts(run("--rollouts", str(path), "--checkpoint", str(tmp_path / "elsewhere")))) == 2


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_is_cut_off_or_of_another_kind(tool, saved, run_folder, share, tmp_path) -> None:
    path = saved("x")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for wrong, message in ((path, "is cut off, or no safetensors file"), (ROOT / "README.md", "is cut off, or no")):
        with pytest.raises(SystemExit, match=f"error: rollouts: .*{message}"):
            tool.main(["--rollouts", str(wrong), "--no_open"])
    with pytest.raises(SystemExit, match="holds no rollouts, it is of format 'pt'"):
        tool.main(["--rollouts", str(run_folder / "model" / "model.safetensors"), "--no_open"])


def test_a_page_that_cannot_be_written(tool, run_folder, tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    words = ["--checkpoint", str(run_folder), "--index", "0", "--num_generations", "1", "--no_open"]
    with pytest.raises(SystemExit, match=r"error: output: .*taken cannot be written"):
        tool.main([*words, "--output", str(tmp_path / "taken")])


def test_a_picture_of_the_models_size_is_not_resized(tool, model, task, tmp_path) -> None:
    board = task.example("test", 0).prompt[1]
    board.save(tmp_path / "a.png")
    config, facts = tool.Config(image=str(tmp_path / "a.png")), {}
    shown = tool.own_prompt(config, model, tool.own_picture(config), facts)[0].prompt[1]
    assert shown.tobytes() == board.tobytes()
    (back,) = model.decode(model.encode([board]))
    assert facts["read back at"].startswith(f"{psnr(pixels_of(board), pixels_of(back)):.1f} dB")


@pytest.mark.parametrize(
    "words",
    [
        ["--image", "nothing.png"], ["--sampler", "image_step=3"], ["--task", "no.such:Task"], ["--rewards", "sucess"],
        ["--output", "{tmp}/taken"], ["--output", "{tmp}/taken/below"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_mistakes_are_found_before_the_model_is_loaded(tool, run_folder, tmp_path, monkeypatch, words) -> None:
    def load(path: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tool.UnifiedModel, "from_pretrained", load)
    (tmp_path / "taken").write_text("")
    words = [word.format(tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit, match="error: "):
        tool.main(["--checkpoint", str(run_folder), *words, "--no_open"])


def test_a_page_opens_on_a_group_with_both_outcomes(run, tool, tmp_path, model, task) -> None:
    settings = SamplerConfig(edit="full", max_rounds=1)
    prompts = tool.task_prompts(tool.Config(), task, range(3))
    batch, views = tool.sample(model, task, prompts, settings, task.region, 2, tool.Config(), {})
    none, all_, both, unknown = [0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [math.nan, math.nan]
    asked: list[list[int]] = []

    def with_outcomes(groups: list[list[float]]) -> RolloutBatch:
        return replace(batch, figures={"success": [value for group in groups for value in group]}, table=None)

    def chosen(*calls: list[list[float]]) -> RolloutBatch:
        """What is shown where the rollouts of each call come out so; later calls as the last."""
        asked.clear()

        def drawn(index: range) -> tuple:
            asked.append(list(index))
            return with_outcomes(calls[min(len(asked), len(calls)) - 1]), views

        return tool.both_outcomes(drawn)[0]

    assert mixed_first(chosen([none, all_, both])) == [4, 5, 0, 1, 2, 3] and asked == [[0, 1, 2]]
    assert mixed_groups(chosen([none] * 3, [none, both, all_])) == [1] and asked == [[0, 1, 2], [3, 4, 5]]
    assert mixed_groups(chosen([none, all_, all_])) == [] and len(asked) == 8
    assert successes(chosen([unknown] * 3)) == [None] * 6 and len(asked) == 1

    path = tmp_path / "run" / "rollouts" / "step-000001.safetensors"
    save_rollouts(path, with_outcomes([none, all_, both]))
    model.save_pretrained(tmp_path / "run" / "model")
    assert list(run("--rollouts", str(path))["galleries"]) == ["test prompt 2", "test prompt 0", "test prompt 1"]


def test_outcomes_are_those_that_records_show(tool, model, task) -> None:
    prompts = tool.task_prompts(tool.Config(), task, range(2))
    batch, views = tool.sample(model, task, prompts, SamplerConfig(edit="full"), task.region, 4, tool.Config(), {})
    for one in (batch, replace(batch, figures={}), replace(batch, figures={}, table=None)):
        assert successes(one) == [made.success for made in records(model, one, views=views)]


def test_rewards_that_a_run_names_are_imported_only_if_it_is_trusted(tool, run, run_folder, colours, tmp_path) -> None:
    folder = tmp_path / "downloaded"
    shutil.copytree(run_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**settings, "rewards": ["success=0.5", "legal_move", "evil:f"]})
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    words = ["--checkpoint", str(folder), "--index", "0", "--num_generations", "1"]
    with pytest.raises(
        SystemExit, match=r"which runs their code: evil:f\. Give --trust_run .* or name others by --rewards"
    ):
        tool.main([*words, "--no_open"])
    with pytest.raises(SystemExit, match="imported"):
        tool.main([*words, "--no_open", "--trust_run"])
    names = {r["name"] for s in rollouts(run(*words, "--rewards", "legal_move"))[0]["segments"] for r in s["rewards"]}
    assert names <= {"legal_move"}
    write_json(folder / "config.json", {**settings, "rewards": ["success=0.5", "legal_move"]})  # the task's own
    assert run(*words)["galleries"]
