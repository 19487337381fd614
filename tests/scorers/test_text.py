"""Text, math and code rewards on segments made by hand."""

import asyncio
import math
import os
import re
import resource
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch

from tests.tables import each
from unidiff.rewards.names import resolve
from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sandbox import Sandbox
from unidiff.scorers import code as code_module
from unidiff.scorers.code import code_tests
from unidiff.scorers.form import integer, tag_count
from unidiff.scorers.judge import judge
from unidiff.scorers.math import MathVerifier, math_answer
from unidiff.scorers.pictures import cell_agreement, edit_locality, pixel_agreement
from unidiff.scorers.remote import pickled, remote
from unidiff.scorers.text import exact_answer, format_pattern, length, numeric_answer, repetition
from unidiff.sequence import Modality


def views(*texts, ended=True, **columns):
    """The texts of one row."""
    made = [
        SegmentView(modality=Modality.TEXT, tokens=torch.arange(len(t.split())), text=t, ended=ended) for t in texts
    ]
    return link_row(made, columns=columns)


def values(reward, *rows):
    """What a reward says of all texts of some rows."""
    said = reward([view for row in rows for view in row])
    return asyncio.run(said) if asyncio.iscoroutine(said) else said


def test_format():
    shape = format_pattern(r"<think>.*</think>\s*<answer>\w+</answer>", weight=0.5, name="shape")
    assert (shape.name, shape.on, shape.weight) == ("shape", "text", 0.5)
    right = "<think>a\nb</think>\n<answer>42</answer>"
    assert values(shape, views(right, right), views(right + "!"), views("")) == [None, 1.0, 0.0, 0.0]
    assert values(shape, views(right, ended=False)) == [0.0]
    assert values(format_pattern("a", which="steps"), views("a", "b", "a")) == [1.0, 0.0, None]


def test_exact():
    tagged = exact_answer(pattern=r"<answer>(.*?)</answer>")
    texts = ["<answer>no</answer> <answer> New  York\n</answer>", "New York", "<answer></answer>"]
    assert [values(tagged, views(t, answer="new york"))[0] for t in texts] == [1.0, 0.0, 0.0]
    assert values(exact_answer("city"), views("Rome", city=["Paris", "rome"]), views("x", city=None)) == [1.0, None]
    (lost,) = values(exact_answer(), views("x", city=1))
    assert isinstance(lost, Missing) and "the row has no column 'answer'; it has: city" in lost.message
    assert values(exact_answer(), views("caf\u00e9", answer="cafe\u0301"), views("7", answer=np.int64(7))) == [1.0, 1.0]


def test_numeric():
    row = values(numeric_answer(), views("so 3 + 4 = 7", answer="#### 7"), views("8", answer=7), views("?", answer=7))
    assert row == [1.0, 0.0, 0.0]
    assert values(numeric_answer(tolerance=0.1), views("3.0", answer=3.14)) == [1.0]
    (lost,) = values(numeric_answer(), views("8", answer="seven"))
    assert isinstance(lost, Missing) and "the right answer 'seven' has no number" in lost.message


def test_length_and_repetition():
    texts = ["a", "a b", "a b c d", "a b c d e f", "a b c d e f g h i"]
    assert values(length(4, least=2), views(*texts)) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert values(length(4, unit="characters", which="last"), views("a", "12345")) == [None, 0.75]
    assert values(repetition(2), views("a b c d", "a b a b a b", "go")) == [0.0, 2 / 5 - 1, 0.0]


@each(
    ("make", "message"),
    [
        (lambda: length(0), "least=0, most=0"),
        (lambda: length(3, unit="lines"), "unit='lines'; choose one of tokens, words, characters"),
        (lambda: repetition(0), "n=0"),
        (lambda: exact_answer(which="first"), "which='first'; choose one of last, all, steps"),
        (lambda: math_answer(seconds=0), "seconds=0"),
        (lambda: math_answer(workers=1.5), "math_answer: workers is 1.5; it must be a whole number"),
        (lambda: numeric_answer(tolerance=-1), "tolerance=-1.0; it must be from 0 to inf"),
        (lambda: numeric_answer(tolerance=math.nan), "numeric_answer: tolerance is nan; it must be a finite number"),
        (lambda: code_tests(tolerance=-1), "tolerance=-1.0; it must be from 0 to inf"),
        (lambda: code_tests(workers=0), "workers=0; it must be 1 or more, or None"),
        (lambda: length(math.inf), "length: most is inf; it must be a whole number"),
        (lambda: format_pattern(3), "format_pattern: pattern is 3; it must be a text"),
        (lambda: exact_answer(["a"]), r"exact_answer: column is \['a'\]; it must be a text"),
        (lambda: exact_answer(name=""), "a reward cannot be named ''"),
        (lambda: pixel_agreement(tolerance=-1), "tolerance=-1; it must be from 0 to 255"),
        (lambda: edit_locality(tolerance=256), "tolerance=256; it must be from 0 to 255"),
        (lambda: cell_agreement(0, 3), "a board of 0 × 3 cells; both must be 1 or more"),
        (lambda: judge("http://host", "m", "r", scale=(0,)), "judge: scale is .*; it must be 2 values"),
        (lambda: remote("http://host", "s", columns="tests"), "remote: columns is 'tests'; it must be a list"),
        (lambda: pickled("http://host", trust_pickle="no"), "pickled: trust_pickle is 'no'; it must be true or false"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("reward", [exact_answer, numeric_answer])
def test_a_pattern_has_its_answer_in_the_group_that_took_part(reward):
    either = reward(pattern=r"Answer: (\d+)|\[(\d+)\]|none")
    assert values(either, *(views(t, answer="7") for t in ("Answer: 7", "[7]", "none", "7"))) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(re.error, match="unterminated"):
        reward(pattern="(")


def test_short_names():
    for name in ("exact_answer", "numeric_answer", "repetition", "math_answer", "code_tests"):
        assert resolve(name).name == name


# --- math -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify")
    made = MathVerifier(workers=1, seconds=20.0)
    yield made
    made.close()


def test_math(verifier):
    pairs = [
        (r"\frac{1}{2}", r"so \boxed{0.5}"),
        ("1/2", r"$\frac{2}{4}$"),
        ("x^2 + 2x + 1", r"Expanding gives $(x+1)^2$."),
        ("x^2 + 2x + 1", "so it is 1"),
        ("7", r"\boxed{8}"),
        ("7", "I do not know"),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ]
    assert verifier.verify(pairs) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_math_works_in_threads_and_uses_no_signals(verifier):
    handler, got = signal.getsignal(signal.SIGALRM), []
    thread = threading.Thread(target=lambda: got.extend(verifier.verify([("2", r"\boxed{2}")] * 3)))
    thread.start()
    thread.join()
    assert got == [1.0] * 3 and signal.getsignal(signal.SIGALRM) is handler


def workers() -> list[psutil.Process]:
    """Processes that verify answers, of this process."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if any("math" in word for word in child.cmdline())]


def test_a_late_or_killed_worker_loses_its_own_answer_only(verifier):
    assert verifier.verify([("2", "$2$")]) == [1.0]
    verifier.seconds, (before,) = 0.3, workers()
    before.suspend()
    late = verifier.verify([("2", "$2$")])[0]
    verifier.seconds = 20.0
    assert isinstance(late, Missing) and late.cause is Cause.TIMEOUT and "longer than 0.3 s" in late.message
    assert not workers()
    assert verifier.verify([("2", "$2$")]) == [1.0]
    (after,) = workers()
    assert after != before
    after.kill()
    after.wait()
    first, second = verifier.verify([("2", "$2$"), ("3", "$3$")])
    assert isinstance(first, Missing) and first.cause is Cause.RAISED and "has died" in first.message and second == 1.0


def test_a_right_answer_that_is_not_understood_is_missing(verifier):
    (lost,) = verifier.verify([("", "$2$")])
    assert isinstance(lost, Missing) and "is not understood" in lost.message


def test_math_reward():
    pytest.importorskip("math_verify")
    rows = [views("think", r"\boxed{4}", answer="4"), views("4", answer=None)]
    assert values(math_answer(workers=1, seconds=30), *rows) == [None, 1.0, None]


# --- code -------------------------------------------------------------------------------------------------------------

GOOD, HALF = "```python\ndef f(x): return x * x\n```", "```python\ndef f(x): return 4\n```"
ASSERTS = ["assert f(2) == 4", "assert f(3) == 9"]


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("tests", "text", "value"),
    [
        (ASSERTS, GOOD, 1.0),
        (ASSERTS, HALF, 0.5),
        (ASSERTS, "no code here", 0.0),
        (None, GOOD, None),
        ({"tests": "assert f(m.inf) == m.inf", "setup": "import math as m"}, GOOD, 1.0),
        ('["assert f(2) == 4", "assert f(3) == 9"]', HALF, 0.5),
        ('"assert f(2) == 4"', GOOD, 1.0),
        ('{"inputs": ["1"], "outputs": ["2"]}', "return 0", 0.0),
        ({"inputs": ["1", "2"], "outputs": ["2\n", "4"]}, "print(int(input()) + 1)", 0.5),
        ({"inputs": [1, 2.5], "outputs": [2, 3.5]}, "print(eval(input()) + 1)\nexit()", 1.0),
        ({"inputs": [["3", "4"], [[5, 6], 7]], "outputs": [["3", 4], "5 6\n7"]}, "while True:\n  try: print(input())\n"
         "  except EOFError: break", 1.0),
        ({"inputs": [10**5000], "outputs": ["1" + "0" * 5000]}, "print(int(input()))", 1.0),
        ({"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]}, HALF, 0.5),
        ({"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [9]]}, GOOD, 1.0),
        ('{"fn_name": "f", "inputs": [[2.5], [null]], "outputs": [6.25, null]}', "def f(x): return x and x * x", 1.0),
        ({"fn_name": "f", "inputs": ["2\n", "3"], "outputs": ["4", "9"]}, GOOD, 1.0),
        ({"fn_name": "f", "inputs": [[2]], "outputs": [{"1": [1, 2]}]},
         "class Solution:\n  def f(self, x): return {1: (1, x)}", 1.0),
        (np.array(ASSERTS, dtype=object), GOOD, 1.0),
        ([{"input": "2", "output": "4"}, {"input": "3", "output": 9}], "print(int(input()) ** 2)", 1.0),
        ([{"fn_name": "f", "input": [2], "output": 4}], GOOD, 1.0),
        ({"tests": "def check(candidate):\n    assert candidate(2) == 4", "entry_point": "f"}, HALF, 1.0),
        ("def test_f():\n    assert f(3) == 9", HALF, 0.0),
    ],
)  # fmt: skip
def test_code(tests, text, value):
    assert values(code_tests(), views(text, tests=tests)) == [value]


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("", "asserts nothing"),
        ("# later", "asserts nothing"),
        ("f(2) == 4", "asserts nothing"),
        (["assert f(2) == 4", "print(f(3) == 9)"], "test 1 is not judged: it asserts nothing"),
        ("def check(candidate):\n    assert candidate(2) == 4", "asserts nothing"),
        ("def helper():\n    assert f(2) == 4", "asserts nothing"),
        ("assert 1 + 1 == 2", "uses nothing of the code"),
        ("assert f(2) ==", "SyntaxError"),
        ("import nothing_here\nassert f(2) == 4", "imports nothing_here, which is not installed"),
        ({"tests": "assert f(1)", "setup": "import nothing_here"}, "the set-up: ModuleNotFoundError"),
        ({"tests": "assert f(1)", "setup": "1 / 0"}, "the set-up: ZeroDivisionError"),
        ([], "tests is empty"),
        (["assert f(2) == 4", None], "tests[1] is None"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [None], "outputs": ["1"]}, "inputs[0] is None"),
        ({"inputs": ["1"], "outputs": [{"a": 1}]}, "outputs[0] is {'a': 1}"),
        ({"inputs": "1", "outputs": ["1"]}, "inputs is a str; it must be a list"),
        ({"fn_name": "f", "inputs": [None], "outputs": [1]}, "inputs[0] is None"),
        ({"fn_name": "f", "inputs": [[object()]], "outputs": [1]}, "is not plain data"),
        ({"fn_name": 3, "inputs": [[1]], "outputs": [1]}, "fn_name is 3"),
        ({"test": ["assert f(1)"]}, "it has 'test'; it needs 'tests', or 'inputs' and 'outputs'"),
        ([{"input": "1"}], "case 0 has 'input'"),
        (7, "a int says nothing"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_judged_says_why_and_costs_itself_alone(tests, words):
    lost, kept = values(code_tests(), views(GOOD, tests=tests), views(GOOD, tests=ASSERTS))
    assert isinstance(lost, Missing) and words in lost.message and lost.message.startswith("column 'tests': ")
    assert kept == 1.0


@pytest.mark.usefixtures("namespaces")
def test_a_row_without_the_column_of_tests_costs_itself_alone():
    code = "def f(x): return x"
    table = reward_table([code_tests()], [views(code, tests="assert f(2) == 2"), views(code, other=1)])
    assert (
        table.values_BSF[0].item() == 1
        and "the row has no column 'tests'; it has: other" in table.missing[0, 1, 0].message
    )


def test_numbers_of_code_have_a_tolerance():
    third = {"fn_name": "f", "inputs": [[1]], "outputs": [[0.33333]]}
    printed = {"inputs": ["1"], "outputs": ["x 0.33333"]}
    rows = [views("def f(x): return [x / 3]", tests=third), views("print('x', 1 / 3)", tests=printed)]
    assert values(code_tests(), *rows) == [0.0, 0.0] and values(code_tests(tolerance=1e-4), *rows) == [1.0, 1.0]


@pytest.mark.usefixtures("namespaces")
def test_a_trainer_without_descriptors_loses_the_row_alone():
    held = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        value, _ = code_module.judge(Sandbox(), "def f(x): return x", ["assert f(1) == 1"])
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(value, Missing) and "Too many open files" in value.message
    assert code_module.judge(Sandbox(), "def f(x): return x", ["assert f(1) == 1"]) == (1.0, False)


def test_values_that_code_could_forge_are_counted():
    weak = views("class P: x = 1", tests=["assert P().x == 1"])
    table = reward_table([code_tests()], [weak, views(GOOD, tests=ASSERTS)])
    assert table.values_BSF.flatten().tolist() == [1.0, 1.0] and table.logged == {"code_weak": [1.0, 0.0]}


def test_a_timeout_ends_what_has_not_begun(monkeypatch):
    """Or the next batch would wait for the rest of one that nobody waits for any more."""
    begun = []

    def slow(box, text, row, tolerance):
        begun.append(text)
        time.sleep(0.2)
        return 1.0, False

    monkeypatch.setattr("unidiff.scorers.code.judge", slow)
    reward = code_tests(workers=1, timeout=1.0)
    rows = [views(f"x = {i}", tests=["assert x"]) for i in range(20)]
    first = reward_table([reward], rows)
    assert first.lost == {("code_tests", Cause.TIMEOUT): 20}
    second = reward_table([reward], rows[:1])
    assert second.values_BSF.tolist() == [[[1.0]]] and len(begun) <= 8


def test_the_same_code_is_judged_once_by_the_same_tests(monkeypatch):
    judged = []

    def judge(box, text, row, tolerance):
        judged.append((text, row["tests"].tolist(), tolerance))
        return (Missing(Cause.RAISED, "busy") if text == "busy" and len(judged) == 1 else 0.5), False

    monkeypatch.setattr("unidiff.scorers.code.judge", judge)
    monkeypatch.setattr("unidiff.scorers.code.VERDICTS", code_module.Verdicts(most=3))
    long = np.arange(5000)
    other = long.copy()
    other[2500] = -1  # which no print of the array shows
    rows = [views("busy", tests={"tests": long}), *(views("x", tests={"tests": t}) for t in (long, long, other))]
    assert [values(code_tests(workers=1), *rows)[1:], len(judged)] == [[0.5] * 3, 3]
    assert values(code_tests(workers=1), *rows) == [0.5] * 4 and len(judged) == 4  # the missing one is asked for again
    values(code_tests(workers=1, tolerance=0.1), *rows)
    assert len(judged) == 7  # other settings
    assert len({(text, tuple(tests), tolerance) for text, tests, tolerance in judged}) == 6
    values(code_tests(workers=1), rows[1])
    assert len(judged) == 8  # of three that are kept it was not one


def test_form():
    tagged = "a <reasoning>1\n2</reasoning> b <answer>3</answer>"
    assert values(resolve("soft_format"), views(tagged), views("<reasoning>1"), views("")) == [1.0, 0.0, 0.0]
    assert values(resolve("tag_count"), views(tagged), views(tagged * 2), views("<answer>")) == [1.0, 0.0, 0.25]
    boxes = [r"\boxed{12}", r"\boxed{ -1,000 } so", r"\boxed{x}", r"\boxed{}", "12", r"\boxed{1.5}", r"\boxed{1,00}"]
    assert values(resolve("boxed"), *map(views, boxes)) == [1, 1, 1, 0, 0, 1, 1]
    assert values(resolve("integer"), *map(views, boxes)) == [1, 1, 0, 0, 0, 0, 0]
    assert values(integer(pattern=r"<answer>(.*?)</answer>"), views(tagged), views("3")) == [1.0, 0.0]
    with pytest.raises(ValueError, match="tags"):
        tag_count(())


@pytest.mark.parametrize(
    ("text", "form", "syntax"),
    [
        ("```python\nx = 1\n```", 1.0, 1.0),
        ("so:\n```\nx = '\\d'\n```", 1.0, 1.0),
        ("```python\nx = 1", 0.5, 1.0),  # not closed
        ("```python\nx = = 1\n```", 0.5, 0.0),
        ("```python\n```", 0.5, 0.0),
        ("```json\n[1]\n```", 0.0, 1.0),
        ("x = 1", 0.0, 1.0),
        ("", 0.0, 0.0),
        ("```python\n" + "-" * 50_000 + "1\n```", 0.5, 0.0),
        ("```python\n" + "(" * 50_000 + "\n```", 0.5, 0.0),
        ("```python\nx = '\0'\n```", 0.5, 0.0),
    ],
)
def test_code_form(text, form, syntax):
    assert values(resolve("code_format"), views(text)) == [form]
    assert values(resolve("code_syntax"), views(text)) == [syntax]


def test_code_gate_and_block():
    right, wrong = "```python\ndef f(): return 1\n```", "```python\ndef f(): return 2\n```"
    both = [views(f"{a}\n{b}", tests=["assert f() == 1"]) for a, b in ((right, wrong), (wrong, right))]
    assert values(code_tests(block="first"), *both) == [1.0, 0.0]
    assert values(code_tests(block="last"), *both) == [0.0, 1.0]
    bare = views("def f(): return 1", tests=["assert f() == 1"])
    assert values(resolve("code_tests"), bare) == [1.0]
    assert values(resolve("gated_code_tests"), bare, both[1]) == [0.0, 1.0]
    assert values(resolve("gated_code_tests"), views(right, tests=None)) == [None]
    with pytest.raises(ValueError, match="block"):
        code_tests(block="middle")
