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
