"""Rows: data of any shape becomes examples; what cannot be used is named by file, row and column."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tables import each
from unidiff.rewards.reward import reward
from unidiff.rewards.segment_view import link_row
from unidiff.rewards.table import reward_table
from unidiff.tasks import Rows, mix, resolve
from unidiff.tasks.task import Place

SUMS = [{"question": f"{i} + {i}", "answer": str(2 * i), "meta": {"level": i % 3}} for i in range(20)]


@reward(on="text")
def length(segments: Any, **columns: Any) -> list[float]:
    return [float(len(s.text)) for s in segments]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def saved(path: Path, size: tuple[int, int] = (5, 3), mode: str = "RGB") -> Path:
    Image.new(mode, size, 7).save(path)
    return path


def task(rows: Any = SUMS, **settings: Any) -> Rows:
    return Rows({"train": rows, "test": [{**row, "held": 1} for row in rows[:3]]}, **settings)


def test_a_format_string_leads_into_nested_columns():
    made = task(
        prompt="level {meta.level}: {question} = ?", columns={"gold": "answer", "twice": lambda r: r["answer"] * 2}
    )
    example = made.example("train", 4)
    assert example.prompt == ["level 1: 4 + 4 = ?"]
    assert (example.columns["gold"], example.columns["twice"], example.columns["meta"]) == ("8", "88", {"level": 1})
    assert made.length("train") == 20 and made.length("test") == 3


def test_nested_json_text_is_read():
    assert task([{"q": "a", "meta": '{"x": [5, 6]}'}] * 2, prompt="{meta.x.1}").example("train", 0).prompt == ["6"]


def test_jsonl_with_pictures_beside_it(tmp_path):
    saved(tmp_path / "a.png", (5, 3))
    rows = [{"prompt": ["Make it blue:", {"image": "a.png"}], "answer": "x"}, {"prompt": ["see", "a.png"]}]
    made = Rows({"train": written(tmp_path / "d.jsonl", rows)})
    for index in range(2):
        text, picture = made.example("train", index).prompt
        assert isinstance(text, str) and picture.size == (5, 3)  # type: ignore[union-attr]
    assert made.example("train", 1).title == f"{tmp_path / 'd.jsonl'}, row 2"


def test_columns_as_trl_has_them(tmp_path):
    shown = Image.new("L", (4, 6))
    rows = [
        {"prompt": "what is it", "image": shown},
        {"prompt": "what are they", "images": [shown, shown]},
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]}],
            "images": [shown],
        },
        {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so"}]},
    ]
    kinds = [[type(p).__name__ for p in task([row] * 2).example("train", 0).prompt] for row in rows]
    assert kinds == [["Image", "str"], ["Image", "Image", "str"], ["Image", "str"], ["str"]]
    made = task(rows[3:] * 2)
    assert made.example("train", 0).prompt == ["so"] and made.example("train", 0).system == "be brief"


def test_bytes_arrays_and_files_are_pictures(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4)).save(buffer, "PNG")
    given = [buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}, np.zeros((4, 4, 3), np.uint8)]
    given += [saved(tmp_path / "x.png", (4, 4), "L"), str(tmp_path / "x.png")]
    for one in given:
        (_, picture) = task([{"say": "go", "shown": one}] * 2, prompt=["{say}", "{shown}"]).example("train", 0).prompt
        assert picture.size == (4, 4) and picture.mode == "RGB"  # type: ignore[union-attr]


def test_csv_and_one_file_alone(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("q,a\n" + "".join(f"{i},{i}\n" for i in range(30)))
    made = resolve(str(path), {"prompt": "{q}?"})
    assert (made.length("train"), made.length("test")) == (27, 3)
    assert made.example("test", 0).prompt == ["27?"]


def test_every_example_comes_once_an_epoch():
    made = task(prompt="{question}")
    seen = [made.training_example(Place(3, n // 4, n % 4, n)).prompt[0] for n in range(60)]
    epochs = [seen[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(e) == sorted(r["question"] for r in SUMS) for e in epochs) and epochs[0] != epochs[1]
    assert made.training_example(Place(3, 9, 1, 37)).prompt[0] == seen[37]  # a resumed run goes on there
    other = [made.training_example(Place(4, n // 4, n % 4, n)).prompt[0] for n in range(20)]
    assert other != epochs[0] and sorted(other) == sorted(epochs[0])


def views(made: Any, split: str, index: int, text: str) -> tuple:
    from unidiff.rewards.segment_view import SegmentView
    from unidiff.sequence import Modality

    example = made.example(split, index)
    own = SegmentView(modality=Modality.TEXT, tokens=np.zeros(1), text=text)  # type: ignore[arg-type]
    return link_row([own], prompt=example.prompt, task=example, columns=dict(example.columns))


def test_rewards_of_a_kind_see_rows_of_that_kind():
    rows = [{"prompt": "a", "kind": "math"}, {"prompt": "b", "kind": "code"}]
    made = task(rows, rewards={"math": [length], "code": [length]})
    table = reward_table(made.rewards(), [views(made, "train", i, "abc") for i in range(2)])
    assert table.names == ("math/length", "code/length")
    assert table.values_BSF[:, 0].isnan().tolist() == [[False, True], [True, False]] and not table.missing


def test_a_mix_has_its_shares_and_each_task_its_own_epochs():
    both = mix(
        a=task(prompt="a{question}", rewards=[length]), b=task(prompt="b{question}", rewards=[length]), weights=[2, 1]
    )
    drawn = [both.training_example(Place(0, n, 0, n)) for n in range(60)]
    assert [e.kind for e in drawn].count("a") == 40
    first = [e.prompt[0] for e in drawn if e.kind == "b"]
    assert len(set(first)) == 20
    assert [r.name for r in both.rewards()] == ["a/length", "b/length"]
    assert both.of(drawn[0]).prompt == "a{question}"  # type: ignore[attr-defined]
    assert both.length("test") == 5  # a, b, a, a, b: then a has no more
    with pytest.raises(TypeError, match="task is a str"):
        mix(a="x")  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"prompt": "{question}"}, [{"quest": "x"}], r"row 1: no column 'question'; did you mean 'quest'"),
    ({"prompt": ["{q}", "{shown}"]}, [{"q": "x", "shown": "no.png"}], r"row 1: .*no.png does not exist"),
    ({"prompt": ["{q}", "{shown}"]}, [{"q": "x", "shown": b"abc"}], r"row 1: a picture of 3 bytes is not a picture"),
    ({"prompt": "{q}"}, [{"q": None}], r"row 1: column 'q' is empty"),
    ({"prompt": "{q}"}, [["x"]], r"row 1 is a list; every row is an object"),
    ({"prompt": "{q}", "writes": "edit"}, [{"q": "x"}], "has no picture to edit"),
    ({}, [{"prompt": 3}], "column 'prompt' is a int"),
]


@each(("settings", "rows", "message"), BAD)
def test_bad_rows_are_named_before_training(settings, rows, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Rows({"train": rows, "test": [{"q": "other", "question": "o", "prompt": "p"}]}, **settings).check()


def test_bad_rows_are_left_out_where_that_is_wanted():
    rows = [{"q": "a"}, {"q": None}, {"q": "b"}]
    made = Rows({"train": rows, "test": [{"q": "c"}]}, prompt="{q}", on_bad_row="skip")
    with pytest.warns(UserWarning, match="1 bad rows of the train rows are left out:\n  the train rows, row 2"):
        made.check()
    assert made.length("train") == 2 and made.example("train", 1).prompt == ["b"] and len(made.skipped["train"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"a": 1}\nnot json\n', "line 2 is not JSON"),
        (None, "does not exist"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Rows({"train": path})


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="are the same rows"):
        Rows({"train": SUMS, "test": SUMS}, prompt="{question}")
    with pytest.raises(ValueError, match="all of its rows are in 'train' too"):
        Rows({"train": SUMS, "test": SUMS[:3]}, prompt="{question}").check()
    with pytest.raises(ValueError, match="not a format string"):
        task(prompt="{question")
    with pytest.raises(ValueError, match="the task has no split 'dev'; it has train, test"):
        task().length("dev")
    with pytest.raises(ValueError, match="unknown task 'frozen_lak'; did you mean 'frozen_lake'"):
        resolve("frozen_lak")
    with pytest.raises(ValueError, match="has no setting 'skil'; did you mean 'skill'"):
        resolve("shapes", {"skil": 1})


def test_a_region_is_a_box_or_a_mask():
    shown = Image.new("RGB", (8, 8))
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 4, 6))
    rows = [{"say": "x", "shown": shown, "box": [2, 2, 4, 6]}, {"say": "x", "shown": shown, "box": mask}]
    made = task(rows, prompt=["{shown}", "{say}"], writes="edit", region="box")
    for index in range(2):
        assert made.example("train", index).region.getbbox() == (2, 2, 4, 6)
    wrong = task(
        [{"say": "x", "shown": shown, "box": [2, 2, 9, 6]}] * 2,
        prompt=["{shown}", "{say}"],
        writes="edit",
        region="box",
    )
    with pytest.raises(ValueError, match=r"column 'box': \[2, 2, 9, 6\] is not a box of a picture of 8 x 8 pixels"):
        wrong.example("train", 0)


@each("name", ["countdown", "functions", "shapes", "edit_shapes", "frozen_lake"])
def test_tasks_that_ship_make_the_same_examples_again_and_demonstrate(name):
    made = resolve(name)
    for index in range(5):
        one, again = made.example("train", index), made.example("train", index)
        assert [p for p in one.prompt if isinstance(p, str)] == [p for p in again.prompt if isinstance(p, str)]
        assert made.demonstration(one)
    prompts = {
        split: {repr([p for p in made.example(split, i).prompt if isinstance(p, str)]) for i in range(40)}
        for split in ("train", "test")
    }
    if name in ("countdown", "functions"):
        assert not prompts["train"] & prompts["test"]


def test_several_names_are_a_mix():
    made = resolve("countdown,shapes", {"countdown.skill": "0.5", "weights": "3,1"})
    assert [made.example("train", i).kind for i in range(4)].count("countdown") == 3
    assert made.tasks["countdown"].skill == 0.5
    with pytest.raises(ValueError, match=r"name the one that it is of: task\.countdown\.skill"):
        resolve("countdown,shapes", {"skill": "0.5"})
    with pytest.raises(ValueError, match="each task once"):
        resolve("countdown,countdown")


def png(size, mode):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_with_the_bytes_of_pictures(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table(
        {
            "say": ["red", "blue", "green"],
            "image": [{"bytes": png((33, 17), mode), "path": "a.png"} for mode in ("RGBA", "L", "1")],
            "meta": [json.dumps({"level": {"n": n}}) for n in range(3)],
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    made = Rows(tmp_path / "d.parquet", ["{say}", "{image}"], writes="edit", columns={"n": "meta.level.n"})
    made.check()
    example = made.example("test", 0)
    assert example.prompt[0] == "green" and example.prompt[1].size == (33, 17) and example.columns["n"] == 2
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file that can be read"):
        Rows(tmp_path / "bad.parquet")


def test_a_dataset_of_the_hub_with_trls_columns():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "what?"}]] * 3,
            "images": [[png((9, 19), mode)] for mode in ("RGB", "P", "LA")],
            "solution": ["a", "b", "c"],
        }
    ).cast_column("images", datasets.Sequence(datasets.Image()))
    splits = {"train": rows.select([0, 1]), "test": rows.select([2])}
    made = Rows(splits, writes="understand", columns={"answer": "solution"}, rewards=["exact_answer"])
    made.check()
    picture, text = made.example("test", 0).prompt
    assert picture.size == (9, 19) and picture.mode == "RGB" and text == "what?"
    with pytest.raises(TypeError, match="IterableDataset"):
        Rows(rows.to_iterable_dataset())
