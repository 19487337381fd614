"""Settings as text: --help in groups, the settings file that it prints, and names with a group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.tables import each
from unidiff.command_line import parse, ungrouped
from unidiff.config import setting
from unidiff.settings_text import help_text


@dataclass
class Grouped:
    name: str = setting("", "a", "what it is called")
    beta: float = setting("loss", 0.5, "weight of the KL")
    kind: Literal["grpo", "gspo"] | None = setting("loss", "grpo", "which loss")
    sizes: list[int] = setting("run", lambda: [3], "of everything")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_and_ends(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Grouped, ["--beta", "many", flag], description="Runs it.")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("Runs it.\n\nsettings:\n  --name a")


def test_help_has_a_line_for_every_setting_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_text(Grouped, "Runs it.").split("\n")
    assert [line for line in lines if line and line[0] != " "] == ["Runs it.", "settings:", "run:", "loss:"]
    assert any(line.split() == ["--beta", "0.5", "weight", "of", "the", "KL"] for line in lines)
    assert any(line.startswith("  --kind grpo") and line.endswith("which loss [grpo, gspo]") for line in lines)
    with pytest.raises(SystemExit) as ended:
        parse(Grouped, ["--help", "loss"])
    assert ended.value.code == 0 and "--sizes" not in (shown := capsys.readouterr().out) and "--beta 0.5" in shown
    with pytest.raises(SystemExit, match="--help knows no 'los'; did you mean 'loss'"):
        parse(Grouped, ["--help", "los"])


def test_the_yaml_of_help_is_a_settings_file(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", help_text(Grouped, topic="yaml"))
    assert parse(Grouped, ["--config", str(path)]) == Grouped()
    assert "  beta: 0.5" in path.read_text() and "# weight of the KL" in path.read_text()


def test_a_setting_may_be_given_with_its_group(tmp_path: Path) -> None:
    assert parse(Grouped, ["--loss.beta", "2", "--run.sizes=4,5"]) == Grouped(beta=2, sizes=[4, 5])
    path = written(tmp_path / "c.yaml", "loss: {beta: 2, kind: gspo}\nname: b\nrun:\n  sizes: [1]\n")
    assert parse(Grouped, ["--config", str(path), "--beta", "3"]) == Grouped("b", 3, "gspo", [1])
    assert ungrouped(Grouped, {"loss.beta": 1, "other": 2}) == {"beta": 1, "other": 2}


@each(
    ("words", "message"),
    [
        (["--beta", "1", "--loss.beta", "2"], "setting 'beta' is given twice, with its group and without"),
        (["--run.beta", "1"], "unknown setting 'run.beta'; beta is in the group 'loss'"),
        (["--loss.bete", "1"], "unknown setting 'bete'; did you mean 'beta'"),
    ],
)
def test_a_setting_is_given_once_and_in_its_group(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        parse(Grouped, words)
