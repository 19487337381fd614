"""Run folders: who may take them, what is kept of a run that ended badly, and where it goes on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unidiff.command_line import parse
from unidiff.files import WriteError, whole_folder, write_json, write_text, write_whole
from unidiff.grpo.config import GRPOConfig
from unidiff.run_folder import RunFolder, read_metrics, resumed, step_of


def config(folder, **settings) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), **settings)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A folder in which three steps were made."""
    folder = RunFolder(tmp_path / "run")
    folder.open(config(folder.path))
    for step in range(3):
        folder.append({"step": step, "loss": 0.5})
    return folder


# ---------------------------------------------------------------------------------------------- claiming


def test_a_folder_that_holds_a_run_is_not_taken(folder):
    with pytest.raises(ValueError, match="holds another run; go on with it"):
        folder.open(config(folder.path))
    folder.open(config(folder.path, resume=True))


def test_a_run_is_not_placed_inside_another_one(folder, tmp_path):
    place = folder.path / "checkpoints" / "mine"
    with pytest.raises(
        ValueError, match=f"output_dir: {place} is inside the run {folder.path}; choose a folder outside"
    ):
        RunFolder(place).open(config(place))
    RunFolder(tmp_path / "beside").open(config(tmp_path / "beside"))


def test_resuming_with_other_settings_names_them(folder):
    with pytest.raises(ValueError, match=r"seed was 0, is 1, learning_rate was 0\.0002, is 0\.1"):
        folder.open(config(folder.path, resume=True, seed=1, learning_rate=0.1))
    with pytest.raises(ValueError, match="max_steps was 80, is 41"):
        folder.open(config(folder.path, resume=True, max_steps=41))


def test_what_may_change_is_said(folder):
    with pytest.raises(ValueError, match=r"\(what may change: .*micro_batch_size, .*tracker; max_steps may grow\)"):
        folder.open(config(folder.path, resume=True, seed=1))
    folder.open(config(folder.path, resume=True, micro_batch_size=1, save_steps=3, quiet=True, cache=False))
    folder.open(config(folder.path, resume=True, max_steps=81))
    assert folder.settings()["max_steps"] == 81 and folder.settings()["save_steps"] == 10


def resume(path: Path, *words: str) -> GRPOConfig:
    return parse(GRPOConfig, ["--resume", "--output_dir", str(path), *words], start=resumed(GRPOConfig))


def test_a_resumed_run_has_the_settings_of_its_folder(tmp_path, monkeypatch):
    first = config(tmp_path / "run", seed=3, learning_rate=1e-3, max_grad_norm=float("inf"), text_threshold=None)
    RunFolder(first.output_dir).open(first)
    assert resume(tmp_path / "run") == replace(first, resume=True)
    assert resume(tmp_path / "run", "--quiet", "--max_steps", "99").max_steps == 99
    (tmp_path / "c.yaml").write_text("resume: yes\noutput_dir: $HOME/run")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(GRPOConfig, ["--config", str(tmp_path / "c.yaml")], start=resumed(GRPOConfig)).seed == 3
    assert parse(GRPOConfig, ["--output_dir", str(tmp_path / "run")], start=resumed(GRPOConfig)).seed == 0
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        RunFolder(tmp_path / "run").open(resume(tmp_path / "run", "--seed", "4"))


MODEL = {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist, so nothing can be resumed"),
        ({}, "holds no run, so nothing can be resumed"),
        ({"run.lock": "process 1"}, "holds no run"),  # killed before its settings were written
        (MODEL, "holds no run"),
        ({"config.json": "{"}, "holds no run"),
        ({"config.json": "{", "metrics.jsonl": '{"step": 0}'}, "config.json is missing or damaged"),
        ({"summary.json": "{}"}, "config.json is missing or damaged"),
        ({"config.json": '{"output_dir": "x", "seeed": 1}'}, "config.json has seeed; it is the run of another program"),
    ],
)
def test_a_folder_without_a_run_is_not_a_new_run(tmp_path, files, message):
    place = tmp_path / "run"
    if files is not None:
        place.mkdir()
    for name, content in (files or {}).items():
        write_text(place / name, content)
    with pytest.raises(SystemExit, match=message):
        resume(place)
    assert place.exists() == (files is not None)


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model/model.safetensors", "checkpoints/last.pt"])
def test_a_folder_of_something_else_is_not_taken(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"output_dir: {tmp_path} holds {Path(name).parts[0]} but no run; choose"):
        RunFolder(tmp_path).open(config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [Path(name).parts[0]]
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("left", [(), ("run.lock",), ("run.lock", "config.json.draft"), (".gitkeep",)], ids=str)
def test_an_empty_folder_is_taken(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    RunFolder(tmp_path).open(config(tmp_path))
    assert not list(tmp_path.glob("*.draft"))


def place_of(kind: str, tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path / kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "file is a file, not a folder"),
        ("file/run/a", "file is a file, not a folder"),
        ("dangling", "dangling is a link to .*nowhere, which does not exist"),
        ("dangling/run", "dangling is a link to .*nowhere, which does not exist"),
        ("loop", "loop is a link to .*loop, which does not exist"),
        ("n" * 300, "cannot be used: File name too long"),
    ],
)
@pytest.mark.parametrize("going_on", [False, True])
def test_a_place_where_no_folder_can_be(tmp_path, kind, message, going_on):
    place = place_of(kind, tmp_path)
    with pytest.raises(ValueError, match=f"^output_dir: .*{message}$"):
        RunFolder(place).open(config(place, resume=going_on))


@pytest.mark.parametrize("below", ["", "run"])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, below):
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"^output_dir: {tmp_path} cannot be written to$"):
        RunFolder(tmp_path / below).open(config(tmp_path / below))


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    RunFolder(tmp_path / "link").open(config(tmp_path / "link"))
    assert (tmp_path / "real" / "config.json").is_file()


# ---------------------------------------------------------------------------------------------- checkpoints


def save(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        with folder.saving(step) as draft:
            (draft / "weights").write_text(f"weights of {step}")
            (draft / "shards").mkdir()
            (draft / "shards" / "0").write_text("0")


def test_checkpoints_are_ordered_by_their_number(folder):
    save(folder, 999_999, 1_000_000)
    assert [step_of(p) for p in folder.checkpoints()] == [999_999, 1_000_000]
    assert step_of(folder.last(2_000_000)) == 1_000_000


@pytest.mark.parametrize(
    "name",
    [
        *("step-000012-copy", "step-00000x.bak", "step-99", "step-0000999", "step-", "step-000009.draft"),
        *("step--00001", "step-000009 (copy)", "STEP-000009", "step-٠٠٠٠٠٩", "step-" + "9" * 30),
    ],
)
def test_a_copy_under_another_name_is_not_a_checkpoint(folder, name):
    save(folder, 1, 2)
    shutil.copytree(folder.checkpoint(2), folder.path / "checkpoints" / name)
    assert step_of(folder.last(80)) == 2
    save(folder, 3)
    assert [step_of(p) for p in folder.checkpoints()] == [2, 3]  # the copy has not taken a place
    assert (folder.path / "checkpoints" / name / "weights").is_file()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def progress(**changes):
    def write(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


DAMAGES = {
    "cut off": ("weights", shorten, "weights is damaged"),
    "empty": ("weights", lambda p: p.write_bytes(b""), "weights is damaged"),
    "one byte": ("weights", lambda p: p.write_bytes(b"W" + p.read_bytes()[1:]), "weights is damaged"),
    "missing": ("weights", Path.unlink, "weights is missing"),
    "a shard": ("shards/0", Path.unlink, "shards/0 is missing"),
    "a folder": ("shards", shutil.rmtree, "shards/0 is missing"),
    "no progress": ("progress.json", Path.unlink, "progress.json is missing"),
    "empty progress": ("progress.json", lambda p: p.write_text(""), "progress.json is damaged"),
    "a list": ("progress.json", lambda p: p.write_text("[]"), "progress.json is damaged"),
    "binary": ("progress.json", lambda p: p.write_bytes(b"\xff\x00"), "progress.json is damaged"),
    "bad files": ("progress.json", progress(files=3), "progress.json is damaged"),
    "negative": ("progress.json", progress(step=-3), r"progress.json says step -3 of 80"),
    "huge": ("progress.json", progress(step=10**18), r"progress.json says step 1\d+ of 80"),
    "text": ("progress.json", progress(step="3"), "progress.json says step '3' of 80"),
    "none": ("progress.json", progress(step=None), "progress.json says step None of 80"),
    "fraction": ("progress.json", progress(step=2.5), r"progress.json says step 2\.5 of 80"),
    "renamed": (".", lambda p: p.rename(p.with_name("step-000079")), "step-000079.progress.json says step 3 of 80"),
    "a file": (".", lambda p: (shutil.rmtree(p), p.write_text("")), "step-000003.progress.json is missing"),
    "a dangling link": (
        ".",
        lambda p: (shutil.rmtree(p), p.symlink_to("gone")),
        "step-000003.progress.json is missing",
    ),
    "too late": (
        ".",
        lambda p: (progress(step=81)(p / "progress.json"), p.rename(p.with_name("step-000081"))),
        "of 80",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside(folder, damage):
    save(folder, 2, 3)
    name, act, message = DAMAGES[damage]
    act(folder.checkpoint(3) / name)
    with pytest.warns(UserWarning, match=rf"{message}; it is kept as step-0000\d\d.damaged, and .*step-000002 goes on"):
        assert folder.last(80) == folder.checkpoint(2)
    save(folder, 3)  # done again
    assert [step_of(p) for p in folder.checkpoints()] == [2, 3] and folder.last(80) == folder.checkpoint(3)
    assert len(list(folder.path.glob("checkpoints/*.damaged"))) == 1  # nothing is lost


def test_no_checkpoint_is_whole(folder):
    save(folder, 2, 3)
    for path in folder.path.glob("checkpoints/*/weights"):
        shorten(path)
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole: .*3/weights is damaged; .*2/weights is damaged\. Put"
    ):
        folder.last(80)
    assert [step_of(p) for p in folder.checkpoints()] == [2, 3]
    assert RunFolder(folder.path.parent).last(80) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", None])
def test_settings_are_in_the_checkpoints_too(folder, content):
    save(folder, 2)
    before = folder.settings()
    folder.settings_file.unlink()
    if content is not None:
        folder.settings_file.write_text(content)
    fault = "missing" if content is None else "damaged"
    with pytest.warns(UserWarning, match=rf"config\.json is {fault}; the settings are those in .*step-000002"):
        assert resume(folder.path).learning_rate == before["learning_rate"]
    with pytest.warns(UserWarning, match=f"is {fault}"), pytest.raises(ValueError, match="seed was 0, is 7"):
        folder.open(config(folder.path, resume=True, seed=7))
    with pytest.warns(UserWarning, match=f"is {fault}"):
        folder.open(config(folder.path, resume=True))
    assert folder.settings() == {**before, "resume": True}


def test_a_run_that_never_began_leaves_the_folder_free(tmp_path):
    """So that a mistaken setting can be mended without another folder."""
    folder = RunFolder(tmp_path / "run")
    folder.open(config(folder.path, seed=0))
    folder.open(config(folder.path, seed=1))
    assert json.loads((folder.path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("left", ["summary.json", "checkpoints/step-000002/progress.json"])
def test_evaluations_and_checkpoints_are_runs_too(tmp_path, left):
    folder = RunFolder(tmp_path)
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(ValueError, match="holds another run"):
        folder.open(config(folder.path))


# ---------------------------------------------------------------------------------------------- metrics


def test_rewinding_drops_the_steps_that_are_done_again(folder):
    assert [m["step"] for m in folder.rewind(2)] == [0, 1]
    folder.append({"step": 2, "loss": 0.25})
    assert [m["loss"] for m in read_metrics(folder.metrics)] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step"', "{", "\n", '{"step": 3, "loss": 0.5}\n{"st'])
def test_a_line_that_was_cut_off(folder, rest):
    with folder.metrics.open("a") as file:
        file.write(rest)
    kept = [m["step"] for m in read_metrics(folder.metrics)]
    assert kept[:3] == [0, 1, 2] and len(kept) == (4 if "\n{" in rest else 3)
    folder.rewind(3)
    folder.append({"step": 3})
    assert [m["step"] for m in read_metrics(folder.metrics)] == [0, 1, 2, 3]


GARBLED = [
    '{"step": 1, "lo',
    '{"step": -7}',
    "\x00\x00",
    "3",
    "null",
    "[]",
    '{"loss": 1}',
    '{"step": "1"}',
    "[" * 100_000,
]


@pytest.mark.parametrize("garbled", GARBLED, ids=lambda text: text[:9])
def test_a_garbled_line_does_not_take_the_later_ones_with_it(folder, garbled):
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("\n".join([lines[0], garbled, lines[2]]) + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2 is garbled and left out"):
        assert [m["step"] for m in folder.rewind(3)] == [0, 2]
    assert [m["step"] for m in read_metrics(folder.metrics)] == [0, 2]


def test_bytes_that_are_not_text(folder):
    folder.metrics.write_bytes(b"\xff\xfe\n" + folder.metrics.read_bytes())
    with pytest.warns(UserWarning, match="line 1 is garbled"):
        assert [m["step"] for m in read_metrics(folder.metrics)] == [0, 1, 2]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# ---------------------------------------------------------------------------------------------- atomic writes


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.fixture
def full(small_disk) -> Path:
    """A disk of 64 KiB."""
    return small_disk(65_536)


def torch_save(draft: Path) -> None:
    torch.save(torch.zeros(100_000), draft)


def safetensors_save(draft: Path) -> None:
    save_file({"w": torch.zeros(100_000)}, draft)


WRITERS = {"text": lambda draft: draft.write_text("x" * 100_000), "torch": torch_save, "safetensors": safetensors_save}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_nothing_is_left(full, writer):
    (full / "file").write_text("before")
    with pytest.raises(WriteError, match=rf"^{full}/file could not be written: .*MB are free on its disk\)$"):
        write_whole(full / "file", WRITERS[writer])
    with (
        pytest.raises(WriteError, match=f"^{full}/folder could not be written: ") as error,
        whole_folder(full / "folder") as draft,
    ):
        WRITERS[writer](draft / "a")
    assert "\n" not in str(error.value)
    assert [p.name for p in full.iterdir()] == ["file"] and (full / "file").read_text() == "before"


def test_the_cause_is_in_the_message(full):
    with pytest.raises(WriteError, match="No space left on device"):
        write_text(full / "file", "x" * 100_000)
    folder = RunFolder(full)
    folder.open(config(full))
    folder.append({"step": 0})
    with pytest.raises(WriteError, match=r"metrics\.jsonl could not be written: No space left on device"):
        folder.append({"step": 1, "text": "x" * 100_000})
    assert [m["step"] for m in read_metrics(folder.metrics)] == [0]


def test_a_checkpoint_on_a_full_disk(full):
    """The one before it stays, and the run can go on from it."""
    folder = RunFolder(full)
    folder.open(config(full))
    save(folder, 1)
    with pytest.raises(WriteError, match=r"step-000002 could not be written: No space"), folder.saving(2) as draft:
        (draft / "weights").write_text("x" * 100_000)
    assert [p.name for p in (full / "checkpoints").iterdir()] == ["step-000001"] and step_of(folder.last(80)) == 1
