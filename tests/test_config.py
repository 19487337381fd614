"""Settings: every type, the file and the command line, and the errors that a user reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.tables import each
from unidiff.command_line import parse
from unidiff.config import FilePath, Unbounded, build, check_fields, convert
from unidiff.settings_file import from_yaml


@dataclass
class Base:
    """steps: how many."""

    steps: int = 10


@dataclass
class Settings(Base):
    """rate: how fast. kind: which."""

    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    level: Literal[1, 2] = 1
    verbose: bool = False
    name: str = "run"
    limit: float | None = None
    parent: str | None = "x"
    either: int | str = 0
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 0.5)
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    place: FilePath = "out"
    origin: FilePath | None = None


def given(*words: str) -> Settings:
    return parse(Settings, words)


# ---------------------------------------------------------------- values


@each(
    ("words", "name", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--steps", "-7"], "steps", -7),
        (["--steps=7"], "steps", 7),
        (["--steps", str(2**62 + 1)], "steps", 2**62 + 1),
        (["--rate", "1e-3"], "rate", 1e-3),
        (["--rate", "2"], "rate", 2.0),
        (["--kind", "b"], "kind", "b"),
        (["--level", "2"], "level", 2),
        (["--verbose"], "verbose", True),
        (["--verbose", "--steps", "3"], "verbose", True),
        (["--verbose", "yes"], "verbose", True),
        (["--verbose", "False"], "verbose", False),
        (["--verbose=0"], "verbose", False),
        (["--name", "a=b"], "name", "a=b"),
        (["--name=a=b"], "name", "a=b"),
        (["--name="], "name", ""),
        (["--name=--odd"], "name", "--odd"),
        (["--limit", "0.5"], "limit", 0.5),
        (["--limit", "none"], "limit", None),
        (["--parent", "None"], "parent", None),
        (["--parent", "null"], "parent", None),
        (["--either", "3"], "either", 3),
        (["--either", "three"], "either", "three"),
        (["--sizes", "3,4,5"], "sizes", (3, 4, 5)),
        (["--sizes", "3"], "sizes", (3,)),
        (["--sizes="], "sizes", ()),
        (["--pair", "3, 4"], "pair", (3, 4.0)),
        (["--names", "x, y"], "names", ["x", "y"]),
        (["--weights", "a=1,b=0.5"], "weights", {"a": 1.0, "b": 0.5}),
        (["--anything", "word"], "anything", "word"),
        (["--steps", "1", "--steps", "2"], "steps", 2),
    ],
)
def test_words_become_values(words: list[str], name: str, value: object) -> None:
    found = getattr(given(*words), name)
    assert found == value and type(found) is type(value)


def test_dashes_may_stand_for_underscores() -> None:
    @dataclass
    class Config:
        learning_rate: float = 0.1

    assert parse(Config, ["--learning-rate", "2"]).learning_rate == 2.0


def test_nothing_given_is_the_default() -> None:
    assert given() == Settings()


@each(
    ("kind", "value", "expected"),
    [
        (int, 3, 3),
        (int, 3.0, 3),
        (int, 2**62 + 1, 2**62 + 1),
        (float, 3, 3.0),
        (float, "1e-4", 1e-4),  # YAML reads 1e-4, without a point, as a text
        (bool, True, True),
        (bool, "no", False),
        (str, 3, "3"),
        (int | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (list[float], [1, "2"], [1.0, 2.0]),
        (list, [1, "2"], [1, "2"]),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (dict, {"a": [1]}, {"a": [1]}),
        (Literal[1, 2], 2, 2),
    ],
)
def test_values_of_a_file_are_converted(kind: Any, value: object, expected: object) -> None:
    found = convert(value, kind, "x")
    assert found == expected and type(found) is type(expected)


# ---------------------------------------------------------------- values from Python


@dataclass(frozen=True)
class Checked:
    count: int = 1
    rate: float = 0.5
    bound: Unbounded = 1.0
    on: bool = False
    name: str = "x"
    kind: Literal["a", "b"] = "a"
    level: Literal[1, 2] = 1
    limit: float | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, int] = (1, 1)
    weights: dict[str, float] = field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        check_fields(self, "Checked.")


@each(
    ("name", "value", "message"),
    [
        ("count", 2.5, "it must be a whole number"),
        ("count", True, "it must be a whole number"),
        ("count", "2", "it must be a whole number"),
        ("count", None, "it must be a whole number"),
        ("count", float("inf"), "it must be a whole number"),
        ("rate", float("nan"), "it must be a finite number"),
        ("rate", np.float32("inf"), "it must be a finite number"),
        ("rate", 10**400, "it must be a number"),
        ("rate", True, "it must be a number"),
        ("rate", 1j, "it must be a number"),
        ("bound", float("nan"), "it must be a finite number"),
        ("on", "no", "it must be true or false"),
        ("on", 1, "it must be true or false"),
        ("name", 3, "it must be a text"),
        ("name", b"x", "it must be a text"),
        ("kind", "A", "choose one of a, b"),
        ("kind", None, "choose one of a, b"),
        ("kind", ["a"], "choose one of a, b"),
        ("level", True, "choose one of 1, 2"),
        ("level", "1", "choose one of 1, 2"),
        ("limit", "none", "it must be a number"),
        ("limit", float("-inf"), "it must be a finite number"),
        ("sizes", "1,2", "it must be a list"),
        ("sizes", 3, "it must be a list"),
        ("pair", (1, 2, 3), "it must be 2 values"),
        ("weights", [], "it must be a mapping"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Checked(**{name: value})  # type: ignore[arg-type]
    assert str(error.value) == f"Checked.{name} is {value!r}; {message}"


@each(
    ("name", "value", "kept"),
    [
        ("count", np.int64(3), 3),
        ("count", 3.0, 3),
        ("rate", 2, 2.0),
        ("rate", np.float32(0.5), 0.5),
        ("bound", float("inf"), float("inf")),
        ("on", np.bool_(True), True),
        ("name", Path("a") / "b", "a/b"),
        ("kind", np.str_("b"), "b"),
        ("limit", None, None),
        ("sizes", [1, np.int32(2)], (1, 2)),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("anything", object, object),
    ],
)
def test_a_value_is_kept_in_plain_form(name: str, value: object, kept: object) -> None:
    found = getattr(Checked(**{name: value}), name)  # type: ignore[arg-type]
    assert found == kept and type(found) is type(kept)


# ---------------------------------------------------------------- errors

WRONG = [
    (["--steps", "many"], "steps is 'many'; it must be a whole number"),
    (["--steps", "1.5"], "steps is '1.5'; it must be a whole number"),
    (["--steps"], "steps is 'true'; it must be a whole number"),
    (["--rate", "fast"], "rate is 'fast'; it must be a number"),
    (["--rate", "none"], "rate is 'none'; it must be a number"),
    (["--kind", "c"], "kind is 'c'; choose one of a, b"),
    (["--level", "3"], "level is '3'; choose one of 1, 2"),
    (["--verbose", "maybe"], "verbose is 'maybe'; it must be true or false"),
    (["--limit", "low"], "limit is 'low'; it must be a number"),
    (["--sizes", "1,x"], "sizes is 'x'; it must be a whole number"),
    (["--pair", "1,2,3"], "pair is ['1', '2', '3']; it must be 2 values"),
    (["--weights", "a"], "weights is 'a'; it must be a mapping, or name=value with commas between them"),
    (["--weights", "a=b"], "weights.a is 'b'; it must be a number"),
    (["--stpes", "3"], "unknown setting 'stpes'; did you mean 'steps'?"),
    (["--verbos"], "unknown setting 'verbos'; did you mean 'verbose'?"),
    (["steps", "3"], "expected --setting value, got 'steps'"),
    (["--steps", "3", "4"], "expected --setting value, got '4'"),
    (["--rate", "nan"], "rate is 'nan'; it must be a finite number"),
    (["--limit", "-inf"], "limit is '-inf'; it must be a finite number"),
    (["--config", "no/such.yaml"], "config file no/such.yaml does not exist"),
]


@each(("words", "message"), WRONG)
def test_wrong_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        given(*words)
    assert caught.value.code == f"error: {message}"


@each(
    ("name", "value", "message"),
    [
        ("steps", 1.5, "steps is 1.5; it must be a whole number"),
        ("steps", True, "steps is True; it must be a whole number"),
        ("steps", None, "steps is None; it must be a whole number"),
        ("steps", float("inf"), "steps is inf; it must be a whole number"),
        ("steps", float("nan"), "steps is nan; it must be a whole number"),
        ("rate", True, "rate is True; it must be a number"),
        ("rate", [1], r"rate is \[1\]; it must be a number"),
        ("name", None, "name is None; it must be a text"),
        ("name", ["a"], "must be a text"),
        ("verbose", None, "verbose is None; it must be true or false"),
        ("verbose", 2, "verbose is 2; it must be true or false"),
        ("sizes", 3, "sizes is 3; it must be a list, or values with commas"),
        ("names", {"a": 1}, "it must be a list"),
        ("weights", [1], "must be a mapping"),
        (True, 1, "unknown setting True"),  # YAML reads the key `on` so
    ],
)
def test_wrong_values_of_a_file_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Settings, {name: value})


def test_required_settings_are_named() -> None:
    @dataclass
    class Config:
        path: str
        parts: list[int]
        steps: int = 1

    with pytest.raises(SystemExit, match="error: setting 'path' is required; give --path"):
        parse(Config, ["--steps", "3"])
    assert parse(Config, ["--path", "x", "--parts", "1"]).path == "x"


def test_errors_of_the_dataclass_itself_are_shown() -> None:
    @dataclass
    class Config:
        steps: int = 1

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise ValueError("steps must be at least 1")

    with pytest.raises(SystemExit, match="error: steps must be at least 1"):
        parse(Config, ["--steps", "0"])


def test_a_dataclass_without_fields() -> None:
    @dataclass
    class Config: ...

    with pytest.raises(SystemExit, match="error: unknown setting 'x'"):
        parse(Config, ["--x"])


# ---------------------------------------------------------------- files


def written(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "steps: 3\nrate: 1e-4\nlimit: null\nsizes: [7]\nweights: {a: 2}\nverbose: on\n")
    for words in (["--config", path, "--steps", "5"], ["--steps", "5", f"--config={path}"]):
        found = given(*words)
        assert (found.steps, found.rate, found.limit, found.sizes) == (5, 1e-4, None, (7,))
        assert found.weights == {"a": 2.0} and found.verbose is True and found.kind == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- steps", "must hold keys and values, it holds list"),
        ("steps", "must hold keys and values, it holds str"),
        ("steps: [", "is not YAML"),
        ("stpes: 3", "unknown setting 'stpes'; did you mean 'steps'?"),
        ("steps: many", "steps is 'many'; it must be a whole number"),
    ],
)
def test_wrong_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        given("--config", written(tmp_path / "c.yaml", content))
    assert str(caught.value).startswith("error: ") and message in str(caught.value)


@each(
    ("line", "value"),
    [
        ("name: 1.10", "1.10"),
        ("name: 010", "010"),
        ("name: 1_0", "1_0"),
        ("name: 12:30", "12:30"),
        ("name: 2024-01-01", "2024-01-01"),
        ("name: 0x1f", "0x1f"),
        ("name: 1e3", "1e3"),
        ("name: yes", "yes"),
        ("name: .inf", ".inf"),
        ("names: [010, 1.10, no]", ["010", "1.10", "no"]),
        ("weights: {1.10: 010}", {"1.10": 10.0}),
        ("parent: 3.0", "3.0"),
        ("parent:", None),
        ("parent: ~", None),
        ("parent: Null", None),
        ("steps: 010", 10),
        ("steps: 3.0", 3),
        ("steps: 2e4", 20000),
        ("rate: 1e-4", 1e-4),
        ("rate: !!float 2", 2.0),
        ("limit: 0.5", 0.5),
        ("verbose: on", True),
        ("verbose: Off", False),
        ("kind: &k b\nparent: *k", "b"),  # one value under another name
        ("name: \ufeffx", "\ufeffx"),
    ],
)
def test_the_field_says_what_a_value_of_a_file_is(line: str, value: object, tmp_path: Path) -> None:
    found = getattr(given("--config", written(tmp_path / "c.yaml", line)), line.partition(":")[0])
    assert found == value and type(found) is type(value)


def test_a_byte_order_mark_is_not_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 3", encoding="utf-8-sig")
    assert given("--config", str(tmp_path / "c.yaml")).steps == 3


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn"))


@each(
    ("content", "message"),
    [
        ("steps: 3\nrate: 1\nsteps: 3", "c.yaml: line 3: 'steps' is given again, first in line 1"),
        ("weights: {a: 1, a: 2}", "c.yaml: line 1: 'a' is given again"),
        (BOMB, "c.yaml: line 2: *a repeats a list or mapping; write it out"),
        ("steps: 3\nweights: &w {a: 1}\nnames: *w", "c.yaml: line 3: *w repeats"),
        ("names: &n [*n]", "c.yaml: line 1: *n repeats"),
        ("names: " + "[" * 5000, "c.yaml is nested too deeply"),
        ("limit: .inf", "limit is '.inf'; it must be a finite number"),
        ("rate: -.INF", "rate is '-.INF'; it must be a finite number"),
        ("rate: .nan", "rate is '.nan'; it must be a finite number"),
        ("steps: .inf", "steps is '.inf'; it must be a whole number"),
        ("name: !!python/object/apply:os.getcwd []", "c.yaml is not YAML: could not determine a constructor"),
        ("steps: !!int many", "c.yaml: invalid literal"),
        ("steps: 1\n---\nsteps: 2", "c.yaml is not YAML"),
        ("<<: {steps: 3}", "unknown setting '<<'"),
        ("place: ~nobody-here/x", "place is '~nobody-here/x'; ~nobody-here is not known here"),
        ("origin: ${NOT_SET}/x", "origin is '${NOT_SET}/x'; ${NOT_SET} is not known here"),
    ],
)
def test_a_file_that_says_two_things_or_too_much_is_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        given("--config", written(tmp_path / "c.yaml", content))
    text = str(caught.value)
    assert text.startswith("error: ") and message in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
def test_a_file_in_another_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: bœuf" if encoding == "cp1252" else "name: Zürich", encoding=encoding)
    with pytest.raises(SystemExit) as caught:
        given("--config", str(tmp_path / "c.yaml"))
    assert caught.value.code == f"error: config file {tmp_path}/c.yaml is not UTF-8 text; save it as UTF-8"


def test_a_folder_is_not_a_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a folder"):
        given("--config", str(tmp_path))


@pytest.mark.parametrize("written_as", ["~/x", "$HOME/x", "${HOME}/x"])
def test_paths_are_read_as_in_a_shell(written_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    content = f"place: {written_as}\norigin: {written_as}\nname: {written_as}\nsteps: 3"
    settings = given("--config", written(tmp_path / "x", content))
    assert settings.place == settings.origin == str(tmp_path / "x") and settings.name == written_as
    assert given(f"--place={written_as}").place == str(tmp_path / "x")
    assert given(f"--config={written_as}").steps == 3

    @dataclass
    class FromPython:
        place: FilePath

        def __post_init__(self) -> None:
            check_fields(self)

    assert FromPython(written_as).place == str(tmp_path / "x")
    assert FromPython(Path(written_as)).place == str(tmp_path / "x")  # type: ignore[arg-type]


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert from_yaml(written(tmp_path / "c.yaml", "# steps: 3\n")) == {}
