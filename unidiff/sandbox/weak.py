"""Tests that run in one interpreter with the code, since they look at its objects: attributes, operators, contexts.

Code that attacks its own test can forge such a verdict, so it is marked `weak`. Known attacks are refused: by name
before the code runs (`trick`), and by what the code's objects answer to a comparison (`Guard`).
"""

import ast
import operator
import os
import sys
from typing import Any

import wire
from exact import HIDDEN, Assertions

ATTACKS = """builtins __builtins__ __import__ importlib gc ctypes inspect _getframe _current_frames f_back f_globals
f_locals f_builtins tb_frame gi_frame cr_frame ag_frame __traceback__ __globals__ __subclasses__ __code__ __closure__
settrace setprofile modules meta_path path_hooks excepthook addaudithook _exit abort kill killpg fork forkpty atexit
signal posix_spawn unittest pytest mock _noted _begun _compared _computed _attribute marshal dis mmap code codeop pdb
bdb trace faulthandler tracemalloc"""
TRICKS = frozenset(ATTACKS.split())
HIDDEN_IN_TEXT = frozenset(name for name in TRICKS if name.startswith("_"))
PREDICATES = frozenset(name for kind in (str, bytes, set, float) for name in dir(kind) if name.startswith("is")) | {
    "startswith", "endswith"}  # fmt: skip
OPERATORS = {
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt,
    "GtE": operator.ge, "Is": operator.is_, "IsNot": operator.is_not, "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b, "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul,
    "MatMult": operator.matmul, "Div": operator.truediv, "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "Pow": operator.pow, "LShift": operator.lshift, "RShift": operator.rshift, "BitAnd": operator.and_,
    "BitOr": operator.or_, "BitXor": operator.xor,
}  # fmt: skip


class Refused(Exception):
    """An object of the code answers as no honest one does."""


def trick(tree):
    """A known attack on the test in the code's syntax tree, or None."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = [part for word in words for part in word.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value in HIDDEN_IN_TEXT else []
        else:
            names = []
        for name in names:
            if name in TRICKS:
                return f"the code uses {name}"
    return stops_iteration(tree)


def stops_iteration(tree):
    """`raise StopIteration` outside of an iterator's method ends a test's loop before it has judged."""
    methods = [node for node in ast.walk(tree) if getattr(node, "name", None) in ("__next__", "__anext__", "next")]
    inside = {id(node) for method in methods for node in ast.walk(method)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and id(node) not in inside:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Name) and part.id in HIDDEN:
                    return f"the code raises {part.id}"
    return None


class Guard(Assertions):
    """What a test asks of the code's objects. named: names of the code that the test uses."""

    def __init__(self, named):
        self.named = named

    def names(self):
        asked = {"_compared": self.compared, "_computed": self.computed, "_attribute": self.attribute}
        return {**super().names(), **asked}

    def watch_unittest(self):
        import unittest

        equal = unittest.TestCase.assertEqual

        def assert_equal(case, first, second, msg=None):
            self.compared(("Eq",), first, second)
            equal(case, first, second, msg)

        setattr(unittest.TestCase, "assertEqual", assert_equal)  # noqa: B010

    def refuse(self, what):
        self.failed = True
        raise Refused(what)

    def compared(self, operators, left, *others):
        result = True
        for name, right in zip(operators, others):
            if name in ("Lt", "LtE", "Gt", "GtE"):
                left, right = self.operands(left, right)
            first = os.urandom(1) < b"\x80"  # a liar does not know which question is the test's
            honest = not first or self.honest(name, left, right)
            result = OPERATORS[name](left, right)
            if result_is_true(result) and not (honest and (first or self.honest(name, left, right))):
                self.refuse(f"a {type(left).__name__} or a {type(right).__name__} of the code is equal to anything")
            if len(others) > 1 and not result:
                return result
            left = right
        return result

    def computed(self, name, left, right):
        return OPERATORS[name](*self.operands(left, right))

    def operands(self, left, right):
        """Both sides of an operation. Beside a plain value an object of a class that the test does not know is taken
        for the plain value that it extends, and refused if it extends none."""
        sides = [left, right]
        for i, (one, other) in enumerate(((left, right), (right, left))):
            if type(other) in wire.PLAIN and self.strange(one):
                kind = next((kind for kind in wire.PLAIN[2:] if isinstance(one, kind)), None)
                if kind is None:
                    self.refuse(f"the test computes with a {type(one).__name__} of the code, which is not plain data")
                sides[i] = kind(one)
        return sides

    def strange(self, value):
        """Whether a value is of a class of the code that the test does not name."""
        kinds = [kind for kind in type(value).__mro__ if kind is not object and not outside(kind)]
        return bool(kinds) and not any(kind.__name__ in self.named for kind in kinds)

    def attribute(self, value, name):
        if name in PREDICATES and self.strange(value) and not isinstance(value, tuple(wire.PLAIN)):
            self.refuse(f"the test asks {name} of a {type(value).__name__} of the code")
        if not outside(type(value)) and any("__getattr" in key for kind in type(value).__mro__[:-1] if not outside(kind)
                                            for key in vars(kind)):  # fmt: skip
            unknown = f"unknown_{os.urandom(6).hex()}"
            answer = getattr(value, unknown, None)
            if answer is not None:
                self.refuse(f"a {type(value).__name__} of the code has any attribute")
        return getattr(value, name)

    def honest(self, name, left, right):
        if name == "Eq":
            return equals_only(left, right)
        if name == "In" and outside(type(right)):
            return all(equals_only(left, one) for one in right if asked(lambda one=one: left == one))
        return name != "In" or not asked(lambda: object() in right)


def outside(kind):
    """Whether a class is Python's or a library's, whatever it says of itself."""
    module = sys.modules.get(getattr(kind, "__module__", ""))
    top = (getattr(kind, "__module__", "") or "").partition(".")[0]
    known = top in sys.stdlib_module_names or top in ("numpy", "pandas")
    return kind in wire.PLAIN or (known and module is not None and getattr(module, kind.__name__, None) is kind)


def result_is_true(result):
    return asked(lambda: result) and not type(result).__module__.startswith(("numpy", "pandas"))


def asked(question):
    try:
        return bool(question())
    except Exception:
        return False


def equals_only(left, right):
    """Whether two values that are equal differ from others: objects of the code are asked about altered values."""
    kind = type(left)
    if kind is type(right):
        if kind in (list, tuple) and len(left) == len(right):
            return all(map(equals_only, left, right))
        if kind is dict:
            values = all(equals_only(value, right.get(key, value)) for key, value in left.items())
            return values and equals_only(set(left), set(right))
        if kind in (set, frozenset):
            own = [one for one in left if not outside(type(one))]
            return all(equals_only(one, other) for one in own for other in right if one == other)
    if outside(kind) and outside(type(right)):
        return True
    own, other = (right, left) if outside(kind) else (left, right)
    return not any(asked(lambda probe=probe: own == probe) for probe in [object(), *altered(other)])


def altered(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, 7]
    if isinstance(value, int | float | complex):
        return [value + 1, -value - 3]
    if isinstance(value, str):
        return [value + "x", value[:-1] + "é"]
    if type(value) in (list, tuple):
        return [value * 2 + type(value)((0,))]
    if isinstance(value, dict):
        return [{**value, "unknown": 1}]
    if isinstance(value, set | frozenset):
        return [{*value, "unknown"}]
    return []
