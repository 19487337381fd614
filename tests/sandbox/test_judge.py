"""What the judge of code says: right solutions earn 1, forgeries do not, and what is not judged is said to be so."""

import os
import re
from pathlib import Path

import numpy
import pytest

from unidiff.sandbox import Case, Sandbox

pytestmark = pytest.mark.usefixtures("namespaces")


def groups(name):
    """name -> (code, tests, "exact", "weak" or None), from a text file beside this one."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    found = {}
    for group in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        title, _, body = group.partition("\n")
        title, kind = re.fullmatch(r"(.*?)(?: \[(exact|weak)\])?", title).groups()
        code, *tests = re.split(r"^---\n", body.rstrip() + "\n", flags=re.MULTILINE)
        found[title] = (code, tests, kind)
    return found


RIGHT, FORGERIES = groups("right_solutions.txt"), groups("forgeries.txt")


@pytest.mark.parametrize("group", RIGHT)
def test_right_solutions_pass(group):
    code, tests, kind = RIGHT[group]
    paths = (os.path.dirname(os.path.dirname(numpy.__file__)),) if "numpy" in code else ()
    report = Sandbox(seconds=20, paths=paths).test(code, tests)
    assert report.passed == (True,) * len(tests), (report.messages, report.unjudged)
    assert kind is None or bool(report.weak) == (kind == "weak"), report.weak


@pytest.mark.parametrize("group", FORGERIES)
def test_no_forgery_passes(group):
    code, tests, _ = FORGERIES[group]
    report = Sandbox(seconds=1.5 if group == "hangs" else 20, processes=4).test(code, tests)
    assert report.passed == (False,) * len(tests), report
    assert not report.unjudged and set(report.messages) == set(range(len(tests)))


def test_a_set_up_belongs_to_each_test_and_may_use_the_code():
    code = """
class Node:
    def __init__(self, value): self.value, self.left, self.right = value, None, None
def height(node): return 0 if node is None else 1 + max(height(node.left), height(node.right))
def double(x): return 2 * x
"""
    box = Sandbox(seconds=20)
    report = box.test(
        code, ["assert height(root) == 2", "assert root.left.value == 2"], "root = Node(1)\nroot.left = Node(2)"
    )
    assert report.passed == (True, True) and set(report.weak) == {0, 1}
    setup = "import math\nseen = []\ndef close(a, b): return math.isclose(a, b, rel_tol=1e-6)\nfour = double(2)"
    tests = ["assert close(double(math.pi), 6.28318531)", "seen.append(double(1))\nassert four == 4 and len(seen) <= 2"]
    report = box.test(code, tests, setup)
    assert report.passed == (True, True) and not report.weak
    assert box.test("", tests, setup).passed == (False, False)


def test_calls_compare_as_json_does_and_cannot_be_forged():
    code = """
class Liar(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
class Any:
    def __eq__(self, other): return True
VALUES = {"n": "n", "t": (1, [2.0]), "d": {1: "a"}, "liar": Liar(7), "any": Any(), "big": 10 ** 5000, "g": iter([1])}
def f(x): return VALUES[x]
"""
    cases = [("n", "n"), ("t", [1, [2]]), ("d", {"1": "a"}), ("big", 10**5000), ("g", [1])]
    wrong = [("n", "m"), ("t", [1]), ("d", {"1": "b"}), ("liar", 9), ("any", 9), ("any", [9]), ("x", 1), ("big", 1)]
    report = Sandbox(seconds=20).call(code, "f", [Case((given,), (wanted,)) for given, wanted in cases + wrong])
    assert report.passed == (True,) * len(cases) + (False,) * len(wrong) and not report.unjudged and not report.weak
    assert report.messages[len(cases) + 6].startswith("KeyError")


HANGS = """
def f(x):
    if x == 3:
        while True: pass
    return x * x
class P:
    x = 1
    def go(self): f(3)
"""


def test_a_hang_costs_its_own_test_alone():
    tests = ["assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16", "assert P().go()", "assert P.x == 1"]
    assert Sandbox(seconds=4).test(HANGS, tests).passed == (True, False, True, False, True)
    calls = Sandbox(seconds=2).call(HANGS, "f", [Case((3,), (9,)), Case((2,), (4,))])
    assert calls.passed == (False, True) and "stopped" in calls.messages[0]


@pytest.mark.parametrize("test", ["while True: pass\nassert f(2) == 4", "import time\ntime.sleep(9)\nassert P.x == 1"])
def test_a_test_that_hangs_before_it_calls_the_code_says_nothing_about_it(test):
    report = Sandbox(seconds=1).test(HANGS, [test, "assert f(2) == 4"])
    assert report.passed == (False, True) and "has not called the code" in report.unjudged[0]


@pytest.mark.parametrize(
    ("test", "unjudged"),
    [
        ("assert f(2) == helper(2)", True),
        ("assert P.x == helper(2)", True),
        ("assert f(LIMIT) == 4", True),
        ("assert helper(2) == 4", False),  # the function under test is missing
        ("from solution import f, helper\nassert helper(2) == f(2)", False),
    ],
)
def test_a_name_that_neither_the_code_nor_the_test_defines_is_not_judged(test, unjudged):
    report = Sandbox(seconds=20).test(HANGS, [test])
    assert report.passed == (False,) and bool(report.unjudged) == unjudged


def test_what_a_program_reads_has_any_length():
    code = "import sys\nprint(len(sys.stdin.read()))"
    pairs = [("x" * size, str(size)) for size in (0, 10, 1 << 16, (1 << 16) + 1, 3_000_000)]
    assert Sandbox(seconds=20).programs(code, pairs).passed == (True,) * len(pairs)
    assert Sandbox(seconds=20, processes=4).programs("print(1)", [("x" * 1_000_000, "1")] * 12).rate == 1


def test_orphans_of_one_test_do_not_use_up_the_processes_of_the_next():
    """The judge is the first process of its namespace, to which they come."""
    code = """
import os
def daemon(x):
    if os.fork() == 0:
        os.fork()
        os._exit(0)
    os.wait()
    return x
"""
    tests = [f"assert daemon({i}) == {i}" for i in range(24)]
    report = Sandbox(seconds=30, processes=4).test(code, tests)
    assert report.passed == (True,) * 24, report


def test_a_wrong_value_is_judged_beside_the_code_only_where_the_code_keeps_it():
    code = """
import functools
def fresh(): return {'a': ([7], {1})}
def same(xs): return xs
def copy(m): return [list(row) for row in m]
@functools.cache
def kept(): return [7]
"""
    tests = ["assert fresh() == 1", "xs = [1]\nassert same(xs) == [2]", "m = [[1], [2]]\nassert copy(m) == m[:1]"]
    report = Sandbox(seconds=20).test(code, [*tests, "assert kept() == [7]", "assert kept() == [9]"])
    assert report.passed == (False, False, False, True, False)
    assert report.weak == {4: "the code keeps what it got or gave"}


ENDS = {
    "a thread that nobody joins": "import threading, time\ndef main():\n    time.sleep(0.1)\n"
    "    print(int(input()) + 1)\nthreading.stack_size(1 << 26)\nthreading.Thread(target=main).start()",
    "atexit": "import atexit\natexit.register(lambda: print(int(input()) + 1))",
    "an executor": "from concurrent.futures import ThreadPoolExecutor\n"
    "ThreadPoolExecutor(1).submit(lambda: print(int(input()) + 1))",
    "a thread that goes on for ever": "import threading, time\nprint(int(input()) + 1)\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "a pool of processes": "from multiprocessing import Pool\ndef f(x): return x + 1\nif __name__ == '__main__':\n"
    "    with Pool(2) as pool: print(pool.map(f, [int(input())])[0])",
    "its own file": "import os\nassert os.path.basename(__file__)\nprint(int(input()) + 1)",
    "exit": "print(int(input()) + 1)\nexit()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_python_ends(end):
    assert Sandbox(seconds=10).programs(ENDS[end], [("1", "2"), ("5", "6"), ("5", "7")]).passed == (True, True, False)
