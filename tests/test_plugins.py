"""What a setting names of the user's own is imported in one way, with errors of one line."""

import os
import re
from pathlib import Path

import pytest

from tests.tables import each
from unidiff import estimators
from unidiff.plugins import imported, split
from unidiff.rewards.names import resolve
from unidiff.rewards.reward import Reward

MODULES = {
    "good_plugin": "from unidiff import reward\n@reward\ndef polite(segments): return []\n"
    "class Task:\n    def make(self): ...\n",
    "broken_plugin": "x = 1\ndef f(:\n",
    "tabs_plugin": "def f():\n\tx = 1\n        y = 2\n",
    "raising_plugin": "\n\nraise RuntimeError('no\\nlicence')\n",
    "leaving_plugin": "import sys\nsys.exit('good bye')\n",
    "needing_plugin": "import package_that_is_not_there_xyz\n",
    "null_plugin": "x = '\0'\n",
    "plugin_package/__init__": "",
    "plugin_package/rewards": "from unidiff import reward\n@reward\ndef kind(segments): return []\n",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


@each("name", ["good_plugin:polite", "good_plugin.polite", "plugin_package.rewards:kind"])
def test_a_colon_or_a_point(name: str) -> None:
    assert isinstance(imported(name), Reward) and isinstance(resolve(f"{name}=2"), Reward)
    assert resolve(f"{name}=2").weight == 2


def test_a_name_in_a_class() -> None:
    assert callable(imported("good_plugin:Task.make"))


WRONG = {
    "good_plugin:polit": "module 'good_plugin' has no 'polit'; did you mean 'polite'?",
    "good_plugin.xyz": "module 'good_plugin' has no 'xyz'; it has: polite",
    "good_plugins:polite": "No module named 'good_plugins'; did you mean 'good_plugin'?",
    "plugin_package.reward:kind": "No module named 'plugin_package.reward'; did you mean 'rewards'?",
    "nowhere_at_all_xyz:f": "No module named 'nowhere_at_all_xyz'; is its folder on the path? PYTHONPATH=. adds",
    "broken_plugin:f": "module 'broken_plugin' cannot be imported: SyntaxError: invalid syntax (",
    "tabs_plugin:f": "module 'tabs_plugin' cannot be imported: TabError: inconsistent use of tabs",
    "null_plugin:f": "module 'null_plugin' cannot be imported: SyntaxError: source code",
    "raising_plugin:f": "module 'raising_plugin' cannot be imported: RuntimeError: no licence (",
    "leaving_plugin:f": "module 'leaving_plugin' cannot be imported: SystemExit: good bye (",
    "needing_plugin:f": "module 'needing_plugin' cannot be imported: it needs 'package_that_is_not_there_xyz'",
    "good_plugin.Task.make": "No module named 'good_plugin.Task'; 'good_plugin' is a module, not a package: write "
    "good_plugin:name",
    "good_plugin.py:polite": "No module named 'good_plugin.py'; 'good_plugin' is a module, not a package: write good_",
    "good_plugin:": "'good_plugin:' names nothing that can be imported; write package.module:name",
    ":polite": "':polite' names nothing that can be imported",
    "..x": "'..x' names nothing that can be imported",
    "a b:c": "'a b:c' names nothing that can be imported",
}


@each("name", WRONG)
def test_errors_are_one_clear_line_for_rewards_and_estimators(name: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve(name)
    assert str(error.value).startswith(f"reward {name!r}: {WRONG[name]}") and "\n" not in str(error.value)
    if not name.startswith("good_plugin") or name.endswith(":"):
        with pytest.raises(ValueError) as error:
            estimators.parse(name)
        assert str(error.value).startswith(f"estimator {name}: {WRONG[name]}")


@each(
    ("name", "said"),
    [
        ("good_plugin:Task", "<class 'good_plugin.Task'> is not a reward: mark the function with @reward"),
        ("json:__doc__", "is not a reward: mark the function with @reward"),
        ("unidiff.scorers.text:numeric_answer", "numeric_answer makes a reward: write my_reward = numeric_answer(…)"),
        ("unidiff.scorers.judge.judge", "judge makes a reward: write my_reward = judge(…), and name that"),
    ],
)
def test_what_is_not_a_reward_is_named(name: str, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"reward {name!r}: ")) as error:
        resolve(name)
    assert said in str(error.value)


def test_the_file_and_the_line_are_named(tmp_path: Path) -> None:
    for name, line in (("broken_plugin", 2), ("raising_plugin", 3), ("leaving_plugin", 2)):
        with pytest.raises(ValueError) as error:
            imported(f"{name}:f")
        assert f"{tmp_path}{os.sep}{name}.py, line {line})" in str(error.value)


def test_names_are_taken_apart() -> None:
    assert split("a.b:c.d") == ("a.b", "c.d") and split("a.b.c") == ("a.b", "c")
