"""Published data sets: their columns, prompts, and what a right, a wrong and an empty response earns."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sequence import Modality
from unidiff.tasks import resolve


def earned(task, text, index=0, split="test"):
    """What each reward gives for one text, by name."""
    view = SegmentView(modality=Modality.TEXT, tokens=torch.arange(4), text=text)
    table = reward_table(task.rewards(), [link_row([view], columns=task.example(split, index).columns)])
    return dict(zip(table.names, table.row_means_BF[0].tolist()))


def file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Options that name two files of a row each."""

    def made(train, test):
        return {"train": file(tmp_path / "train.jsonl", [train]), "test": file(tmp_path / "test.jsonl", [test])}

    return made


def test_gsm8k(files):
    rows = [{"question": f"{i} dozens of {{eggs}}?", "answer": f"so\n#### {n}"} for i, n in ((1, "12"), (9, "1,008"))]
    task = resolve("gsm8k", files(*rows))
    task.check()
    assert task.example("test", 0).prompt[0].endswith("9 dozens of {eggs}?")
    right = r"<reasoning>9 * 112</reasoning> \boxed{1008}"
    assert earned(task, right) == {"correct": 1.0, "integer": 1.0, "soft_format": 1.0}
    assert earned(task, r"\boxed{1,008}") == {"correct": 1.0, "integer": 1.0, "soft_format": 0.0}
    assert set(earned(task, "").values()) == {0.0}
    assert [reward.weight for reward in task.rewards()] == [2.0, 0.5, 0.5]


def test_math500(files):
    task = resolve("math500", files({"problem": "?", "solution": r"\boxed{2}"}, {"problem": "!", "answer": "1/2"}))
    assert [task.example(split, 0).columns["gold"] for split in ("train", "test")] == ["2", "1/2"]
    assert earned(task, r"\boxed{\frac{2}{4}}") == {"correct": 1.0, "boxed": 1.0}
    bad = resolve("math500", files({"problem": "?", "solution": "2"}, {"problem": "?", "answer": "2"}))
    with pytest.raises(ValueError, match=r"train\.jsonl, row 1: .*boxed"):
        bad.check()


def test_countdown(files):
    task = resolve("countdown_3to4", files({"nums": [1, 2, 3], "target": 6}, {"input": "30,100,93", "output": "23"}))
    assert [earned(task, f"<answer>{text}</answer>")["expression"] for text in ("93 - (100 - 30)", "23", "x")] == [
        1.0,
        pytest.approx(0.1),
        pytest.approx(0.1),
    ]
    assert earned(task, "93 - (100 - 30)") == {"expression": 0.0}


def test_sudoku(tmp_path):
    right = "1234341221434321"
    (tmp_path / "s.csv").write_text(f"Puzzle,Solution\n0234341221434321,{right}\n1200341221434321,{right}\n")
    task = resolve("sudoku", {"train": str(tmp_path / "s.csv")})
    assert earned(task, f"<answer>{right}</answer>") == {"cells": 1.0}
    assert earned(task, "<answer>1231</answer> so <answer>1231 3412 2143 4321</answer>") == {"cells": 0.5}
    assert earned(task, right) == {"cells": 0.0}
    with pytest.raises(ValueError, match="needs files"):
        resolve("sudoku")


def test_acecode(files):
    row = {"question": "Write f.", "test_cases": ["assert f(1) == 2", "assert f(2) == 3"]}
    task = resolve("acecode", files(row, row | {"question": "Write g."}))
    assert task.example("test", 0).prompt[0].endswith("Write g.\nTest cases: assert f(1) == 2")
    block = "```python\ndef f(x): return {}\n```"
    assert earned(task, block.format("x + 1")) == {"passed": 1.0, "code_format": 1.0}
    assert earned(task, block.format("2") + "\n" + block.format("x + 1")) == {"passed": 0.5, "code_format": 1.0}
    assert earned(task, "def f(x): return x + 1") == {"passed": 0.0, "code_format": 0.0}


def test_mbpp(files):
    rows = [
        {"text": "a", "test_list": ["assert f() == 1"], "test_setup_code": ""},
        {"prompt": "b", "test_list": ["assert f() == math.floor(1.5)"], "test_imports": ["import math"]},
    ]
    task = resolve("mbpp", files(*rows))
    assert "assert f() == math.floor(1.5)" in task.example("test", 0).prompt[0]
    assert earned(task, "```python\ndef f(): return 1\n```")["passed"] == 1.0


def test_humaneval(tmp_path):
    rows = [{"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(g):\n    assert g(1) == 2\n"}]
    task = resolve("humaneval", {"test": file(tmp_path / "h.jsonl", rows)})
    task.check()
    assert earned(task, "```python\ndef f(x):\n    return x + 1\n```")["passed"] == 1.0
    assert earned(task, "```python\ndef f(x):\n    return x\n```")["passed"] == 0.0
    with pytest.raises(ValueError, match="no split 'train'"):
        task.length("train")


def test_pictures_need_a_reward(tmp_path):
    rows = file(tmp_path / "p.jsonl", [{"prompt": f"a photo of {n} dogs", "tag": "counting"} for n in (2, 3)])
    with pytest.raises(ValueError, match="no reward"):
        resolve("prompts", {"train": rows, "clip": "none"})
    task = resolve("prompts", {"train": rows, "clip": "none", "geneval": "http://127.0.0.1:9", "hpsv3": "http://x:1"})
    assert [(r.name, r.weight) for r in task.rewards()] == [("hpsv3", 0.2), ("geneval", 1.0)]
    assert task.writes == "image" and task.example("test", 0).columns["asked"]["tag"] == "counting"
    with pytest.raises(ValueError, match="no reward"):
        resolve("edits", {"train": rows, "locality": "0"})
    assert [r.name for r in resolve("edits", {"train": rows, "judge_url": "http://x"}).rewards()] == [
        "judge",
        "edit_locality",
    ]


def test_the_hub_is_asked_where_there_is_no_file(monkeypatch):
    asked = []

    def load_dataset(*words, split):
        asked.append((*words, split))
        return [{"question": split, "answer": "#### 1"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = resolve("gsm8k")
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert task.length("test") == 1
    module.load_dataset = lambda *words, split: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"cannot be loaded .*--task\.train"):
        resolve("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"unidiff\[data\]"):
        resolve("gsm8k")


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = resolve("reasoning_gym", {"dataset": "chain_sum", "min_terms": "2", "max_terms": "2", "size": "50"})
    again = resolve("reasoning_gym", {"dataset": "chain_sum", "min_terms": "2", "max_terms": "2", "size": "50"})
    example = task.example("test", 3)
    assert example.prompt == again.example("test", 3).prompt != task.example("train", 3).prompt
    assert task.length("train") == 50
    (best,) = task.best(example)
    assert earned(task, best, 3) == {"score": 1.0} and earned(task, "", 3) == {"score": 0.0}
    for options, message in (
        ({"dataset": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "terms": "2"}, "no setting 'terms'"),
        ({"dataset": "chain_sum", "min_terms": "x"}, "min_terms is 'x'"),
        ({"dataset": "chain_sum", "min_terms": "0"}, "chain_sum"),
        ({}, "needs a setting: --task.dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve("reasoning_gym", options)
