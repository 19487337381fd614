"""Tests that run in one interpreter with the code, since they look at its objects: attributes, operators, contexts.

Code that attacks its own test can forge such a verdict, so it is marked `weak`. Known attacks are refused: by name
before the code runs (`trick`); and an assertion about the code's objects is tried under false assumptions before it is
believed (`Guard`).
"""

import ast
import operator
import os
import random
import signal
import sys
from typing import Any

import stand_in
import translate
import wire
from exact import HIDDEN, Assertions

# What no solution of a task needs: names, wherever they are; `owner.name`, of a module or class; modules (`name.`).
ATTACKS = """__builtins__ __globals__ _getframe _current_frames _exit currentframe f_back f_globals f_locals f_builtins
tb_frame gi_frame cr_frame ag_frame settrace setprofile meta_path path_hooks addaudithook get_referrers get_referents
gc.get_objects inspect.stack inspect.trace sys.excepthook os.abort
object.__subclasses__ type.__subclasses__ mock.ANY mock.Mock mock.MagicMock os.getpid os.getppid
atexit.register ctypes. mock. faulthandler."""
TRICKS = frozenset(ATTACKS.split())
HIDDEN_IN_TEXT = frozenset(name for name in TRICKS if name.startswith("_"))
STREAMS = ("stdin", "stdout", "stderr")  # of sys: programs set them
PREDICATES = frozenset(name for kind in (str, bytes, set, float) for name in dir(kind) if name.startswith("is"))
PREFIXES = ("startswith", "endswith")
OPERATORS = {
    "Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt,
    "GtE": operator.ge, "Is": operator.is_, "IsNot": operator.is_not, "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b, "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul,
    "MatMult": operator.matmul, "Div": operator.truediv, "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "Pow": operator.pow, "LShift": operator.lshift, "RShift": operator.rshift, "BitAnd": operator.and_,
    "BitOr": operator.or_, "BitXor": operator.xor,
}  # fmt: skip
SHIFTED = ("Add", "Sub", "Mult", "Div", "FloorDiv")
MOST_TRIED = 50  # assertions of a test
HELD = 7  # exit status
COPY_SECONDS = 1
OURS = (*wire.PLAIN, *stand_in.KINDS)
MADE_BY_PYTHON = 1 << 9  # a flag of classes


class Refused(Exception):
    """An object of the code answers as no honest one does."""


def trick(tree):
    """A known attack on the test in the code's syntax tree, or None."""
    imported = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        if isinstance(node, ast.Import | ast.ImportFrom):
            above, given = (getattr(node, "module", None) or "").split("."), [alias.name for alias in node.names]
            names = given + [f"{above[-1]}.{name}" for name in given]
            names += [f"{part}." for name in [*above, *given] for part in name.split(".")]
        elif isinstance(node, ast.Attribute):
            owner = translate.name_of(node.value)
            names = [node.attr, f"{imported.get(owner, owner or '').split('.')[-1]}.{node.attr}"]
        elif isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and node.value in HIDDEN_IN_TEXT):
            names = [node.id if isinstance(node, ast.Name) else node.value]
        for name in names:
            if name in TRICKS:
                return f"the code uses {name}"
    return patches(tree, imported) or stops_iteration(tree)


def patches(tree, imported):
    """An assignment to something of a module: the test may use it too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            stream, owner = getattr(node, "attr", None) in STREAMS, node
            while isinstance(owner, ast.Attribute | ast.Subscript):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in imported and not stream:
                return f"the code changes the module {owner.id}"
    return None


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
    """What a test asks of the code's objects. named: names of the code that the test uses.

    Before an assertion is believed, copies of the process try it. In two of them nothing that is compared with an
    object of the code is equal to it, and numbers that it is combined with are larger, or smaller. In the third it is
    equal to itself, and less is greater. Where an assertion holds in all of them, the object lies.
    """

    mutant, armed, tried = 0, False, 0

    def __init__(self, named):
        self.named = named

    def names(self):
        return {**super().names(), "compared": self.compared, "computed": self.computed,
                "attribute": self.attribute, "given": self.given, "operands": self.operands}  # fmt: skip

    def begun(self, swallowed):
        self.leave(False)  # in a copy: the condition was never known
        self.armed = self.tried < MOST_TRIED
        return super().begun(swallowed)

    def touched(self):
        """The assertion asks something of an object of the code: the copies go on from here. True in a copy."""
        if self.armed:
            self.armed, self.tried = False, self.tried + 1
            for self.mutant in (1, 2, 3):
                child = os.fork()
                if child == 0:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(COPY_SECONDS)  # it may wait for what never is
                    return True
                if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != HELD:
                    break
            else:
                self.refuse("an object of the code answers the same, whatever it is compared with")
            self.mutant = 0
        return self.mutant > 0

    def leave(self, held):
        if self.mutant:
            os._exit(HELD if held else 0)

    def noted(self, swallowed, value):
        self.armed = False
        self.leave(value)
        return super().noted(swallowed, value)

    def operands(self, name, first, second):
        """What a method such as assertEqual gets. Copies answer instead of it, as the operator does."""
        self.begun(0)
        if (own(first) or own(second)) and self.touched():
            self.leave(self.asked(name, first, second))
        self.armed = False
        return first, second

    def refuse(self, what):
        self.failed = True
        raise Refused(what)

    def compared(self, operators, left, *others):
        result = True
        for name, right in zip(operators, others):
            result = self.asked(name, left, right)
            if len(others) > 1 and not result:
                return result
            left = right
        return result

    def asked(self, name, left, right):
        """The answer to one comparison, in a copy to another one."""
        ask = OPERATORS[name]
        if name in ("Is", "IsNot") or not (own(left) or own(right)):
            return ask(left, right)
        one, other = (left, right) if own(left) else (right, left)
        one, other = (list(side) if type(side) in (set, frozenset) else side for side in (one, other))
        if not self.touched():
            answer = ask(left, right)
            said_equal = name in ("Eq", "NotEq") and answer is (name == "Eq")
            if said_equal and all(is_equal(one, altered(other, sign, one)) for sign in (1, -1)):
                self.refuse(f"a {type(one).__name__} of the code is equal to other values too")
            return answer
        if name in ("Eq", "NotEq"):
            if self.mutant == 3:
                return ask(one, one)
            other = self.other(other, one)
            return ask(one, other) if own(left) else ask(other, one)
        if name in ("In", "NotIn"):
            return self.contained(left, right) == (name == "In")
        if self.mutant < 3:
            return ask(left, right)
        opposite = operator.gt if name in ("Lt", "LtE") else operator.lt
        try:
            return opposite(left, right)
        except TypeError:  # it has not both
            sign = -1 if (name in ("Lt", "LtE")) == own(left) else 1
            return ask(left, sign * float("inf")) if own(left) else ask(sign * float("inf"), right)

    def contained(self, left, right):
        """In a copy: whether something is contained. In the third all is; in the others what is unlike all there is."""
        if self.mutant == 3:
            return True
        if own(right, 0):
            return object() in right
        return any(left == one for one in map(self.other, right) if one not in list(right))

    def other(self, value, beside=None):
        return altered(value, 3 - 2 * self.mutant, beside)

    def computed(self, name, left, right):
        if name in SHIFTED and own(left) != own(right) and self.touched() and self.mutant < 3:
            left, right = (one if own(one) else shifted(one, 3 - 2 * self.mutant) for one in (left, right))
        return OPERATORS[name](left, right)

    def attribute(self, value, name):
        if own(value, 0):
            unknown = f"unknown_{os.urandom(6).hex()}"
            answers = any("__getattr" in key for kind in kinds_of(type(value)) for key in vars(kind))
            if answers and getattr(value, unknown, None) is not None:
                self.refuse(f"a {type(value).__name__} of the code has any attribute")
            named = any(kind.__name__ in self.named for kind in kinds_of(type(value)))
            if name in PREDICATES and not named and not isinstance(value, wire.PLAIN):
                self.refuse(f"the test asks {name} of a {type(value).__name__} of the code")
            if name in PREFIXES and self.touched():
                method = getattr(value, name)
                return lambda *given: method(*(self.other(one) if self.mutant < 3 else type(one)() for one in given))
        return self.given(getattr(value, name))

    def given(self, value):
        """What the test gets from the code: an object that is equal to anything is refused."""
        if own(value, 0) and any("__eq__" in vars(kind) for kind in kinds_of(type(value))):
            text = os.urandom(6).hex()
            strange = [object(), text, (text,), random.random()]
            numbers = [random.randrange(1 << 40) for _ in range(16)]
            if any(is_equal(value, one) for one in strange) or all(is_equal(value, one) for one in numbers):
                self.refuse(f"a {type(value).__name__} of the code is equal to anything")
        return value


def kinds_of(kind):
    return [one for one in type.mro(kind) if one is not object and not outside(one)]


def outside(kind):
    """Whether a class is Python's or a library's, whatever it says of itself."""
    if kind in OURS or not vars(type)["__flags__"].__get__(kind) & MADE_BY_PYTHON:
        return True
    module = sys.modules.get(getattr(kind, "__module__", ""))
    top = (getattr(kind, "__module__", "") or "").partition(".")[0]
    known = top in sys.stdlib_module_names or top in ("numpy", "pandas")
    return known and module is not None and getattr(module, kind.__name__, None) is kind


def own(value: Any, depth: int = 4) -> bool:
    """Whether a value is of a class of the code, is such a class, or holds such a value."""
    if isinstance(value, type) and depth:
        return bool(kinds_of(value) or kinds_of(type(value)))
    if type(value) in (list, tuple, set, frozenset, dict) and depth:
        items: Any = [*value, *value.values()] if type(value) is dict else value
        return any(own(one, depth - 1) for one in items)
    return bool(kinds_of(type(value)))


def is_equal(value, other):
    try:
        return (value == other) is True
    except Exception:
        return False


def altered(value: Any, sign: int, beside: Any = None) -> Any:
    """Another value, as near as may be. sign: 1 or -1, for one or another. beside: what it is compared with; only what
    meets objects of the code there is altered."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | complex):
        return value + 1 if sign > 0 else -value - random.randrange(1, 50)
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, bytes):
        return value + b"x"
    if type(value) in (list, tuple):
        pairs = zip(value, beside) if type(beside) is type(value) else ((one, None) for one in value)
        made = [altered(one, sign, it) if it is None or own(it) else one for one, it in pairs]
        return type(value)(made or "x")
    if type(value) is dict:
        kept = beside if type(beside) is dict else {}
        made = {k: altered(v, sign, kept.get(k)) if k not in kept or own(kept[k]) else v for k, v in value.items()}
        return made or {"x": 0}
    if isinstance(value, stand_in.approx):
        return stand_in.approx(altered(value.expected, sign), value.rel, value.abs)
    return object()


def shifted(value: Any, sign: int) -> Any:
    return value + sign * (100 + 3 * abs(value)) if isinstance(value, int | float | complex) else value
