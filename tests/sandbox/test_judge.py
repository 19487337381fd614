"""What the judge of code says: right solutions earn 1, forgeries do not, and what is not judged is said to be so."""

import os

import numpy
import pytest

from unidiff.sandbox import Case, Sandbox

pytestmark = pytest.mark.usefixtures("namespaces")

# --- right solutions --------------------------------------------------------------------------------------------------

# name: code, tests, and whether the verdict is exact
RIGHT = {
    "plain values": (
        "def shapes(): return (1, [2.5, {'a': {3}}], b'x', None, float('inf'), 10**30, range(2), 3j, frozenset({1}))\n"
        "def nothing(): pass\ndef not_a_number(): return float('nan')",
        ["assert shapes() == (1, [2.5, {'a': {3}}], b'x', None, float('inf'), 10**30, range(2), 3j, frozenset({1}))",
         "assert nothing() is None", "x = not_a_number()\nassert x != x", "assert type(shapes()) is tuple"],
        True,
    ),
    "plain-like values": (
        "from decimal import Decimal as D\nfrom fractions import Fraction\nfrom datetime import *\n"
        "from collections import *\n"
        "def price(x): return D(x) / 8\ndef half(): return Fraction(1, 2)\ndef day(n): return date(2024, 2, 28) + "
        "timedelta(days=n)\ndef moment(): return datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)\n"
        "def at(): return time(1, 2)\ndef queue(n): return deque(range(n), maxlen=3)\n"
        "def count(s): return Counter(s)\ndef group(s):\n    d = defaultdict(list)\n    for c in s: d[c].append(1)\n"
        "    return d\ndef order(): return OrderedDict(b=1, a=2)\ndef keys(): return {'a': 1, 'b': 2}.keys()",
        ["from decimal import Decimal\nassert price(1) == Decimal('0.125')", "assert half() * 2 == 1",
         "import datetime\nassert day(2) == datetime.date(2024, 3, 1) and day(2).month == 3",
         "import datetime as dt\nassert moment() == dt.datetime(2024, 1, 2, 3, 4, 5, 6, dt.timezone.utc)",
         "assert at().minute == 2", "from collections import deque\nassert queue(5) == deque([2, 3, 4])",
         "assert count('aab').most_common(1) == [('a', 2)]", "assert group('ab') == {'a': [1], 'b': [1]}",
         "assert list(order()) == ['b', 'a']", "assert set(keys()) == {'a', 'b'} and len(keys()) == 2"],
        True,
    ),
    "huge integers": (
        "def power(n): return 10 ** n\ndef digits(n): return len(str(n))",
        ["assert power(5000) == 10 ** 5000", "assert power(4999) == " + "1" + "0" * 4999,
         "assert digits(10 ** 5000) == 5001"],
        True,
    ),
    "assert and its kin": (
        "def f(x): return x * x\ndef names(): return ['b', 'a', 'a']",
        ["assert f(3) in (8, 9)", "assert 'c' not in names()", "assert f(2) != 5", "assert 3 < f(2) <= 4",
         "assert abs(f(0.1) - 0.01) < 1e-9", "import math\nassert math.isclose(f(1.1), 1.21)", "assert not f(0)",
         "assert f(1)", "assert f(1) and f(2) or f(0)", "assert sorted(names()) == ['a', 'a', 'b']",
         "assert len(names()) == 3", "assert set(names()) == {'a', 'b'}", "assert f(f(2)) == 16, f'got {f(f(2))}'",
         "assert all(f(i) == i ** 2 for i in range(9))", "assert list(map(f, [1, 2])) == [1, 4]",
         "assert max([-3, 2], key=f) == -3", "for i in range(5):\n    assert f(i) == i * i",
         "assert isinstance(f(2), int)", "assert [f(i) for i in range(3)] == [0, 1, 4] == [0, 1, f(2)]",
         "assert (y := f(3)) == 9 and y > 8", "assert f(x=2) == 4", "assert f(*[2]) == 4 == f(**{'x': 2})",
         "assert round(f(1.5), 1) == 2.2", "assert str(f(2)) == '4' and names().count('a') == 2 and names()[0] == 'b'"],
        True,
    ),
    "approximate, with pytest": (
        "def third(): return [1 / 3, 2 / 3]",
        ["import pytest\nassert third() == pytest.approx([0.3333333, 0.6666667])",
         "from pytest import approx\nassert third()[0] == approx(0.33, abs=0.01)",
         "import pytest\n@pytest.mark.parametrize('i, x', [(0, 0.333), (1, 0.667)])\ndef test_it(i, x):\n"
         "    assert third()[i] == pytest.approx(x, rel=1e-2)"],
        True,
    ),
    "raises": (
        "import json\ndef root(x):\n    if x < 0: raise ValueError('below 0')\n    return x ** 0.5\n"
        "def key(): return {}['k']\ndef stop(): raise SystemExit(2)\ndef read(): return json.loads('{')",
        ["try:\n    root(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'below 0'",
         "try:\n    key()\nexcept KeyError as e:\n    assert e.args == ('k',)\nelse:\n    assert False",
         "import pytest\nwith pytest.raises(ValueError, match='below'):\n    root(-2)",
         "import pytest\npytest.raises(KeyError, key)", "import pytest\nwith pytest.raises(SystemExit):\n    stop()",
         "raised = False\ntry:\n    root(-1)\nexcept Exception:\n    raised = True\nassert raised"],
        True,
    ),
    "raises an exception of a library": (
        "import json\ndef read(): return json.loads('{')",
        ["import json\ntry:\n    read()\n    assert False\nexcept json.JSONDecodeError as e:\n    assert e.pos == 1"],
        False,
    ),
    "own exceptions": (
        "class Empty(Exception):\n    def __init__(self, n): self.n = n\ndef pop(xs):\n    if not xs: raise Empty(3)\n"
        "    return xs.pop()",
        ["try:\n    pop([])\n    assert False\nexcept Empty as e:\n    assert e.n == 3",
         "import pytest\nwith pytest.raises(Empty) as info:\n    pop([])\nassert info.value.n == 3",
         "assert issubclass(Empty, Exception)"],
        False,
    ),
    "attributes and constants": (
        "RATE = 3\nclass P:\n    size = 7\n    def __init__(self, x=1): self.x = x\n    @property\n"
        "    def twice(self): return 2 * self.x\n    @staticmethod\n    def make(): return P(5)\n"
        "    @classmethod\n    def of(cls, x): return cls(x)\ndef make(): return P(9)",
        ["assert P().x == 1", "assert P.size == 7 and RATE == 3", "assert P(4).twice == 8", "assert P.make().x == 5",
         "assert P.of(2).x == 2", "assert make().x == 9", "p = P()\np.x = 6\nassert p.twice == 12",
         "assert hasattr(P(), 'x') and not hasattr(P(), 'y')", "assert getattr(P(8), 'x') == 8"],
        False,
    ),
    "operators": (
        "class V:\n    def __init__(s, *v): s.v = v\n    def __add__(s, o): return V(*(a + b for a, b in zip(s.v, o.v)))\n"
        "    def __eq__(s, o): return isinstance(o, V) and s.v == o.v\n    def __mul__(s, k): return V(*(a * k for a in s.v))\n"
        "    __rmul__ = __mul__\n    def __abs__(s): return sum(a * a for a in s.v) ** 0.5\n"
        "    def __lt__(s, o): return abs(s) < abs(o)\n    def __neg__(s): return s * -1\n    def __hash__(s): return hash(s.v)\n"
        "    def __repr__(s): return f'V{s.v}'\n    def __getitem__(s, i): return s.v[i]\n    def __bool__(s): return any(s.v)",
        ["assert V(1, 2) + V(3, 4) == V(4, 6)", "assert V(1, 2) * 3 == V(3, 6) == 3 * V(1, 2)", "assert abs(V(3, 4)) == 5",
         "assert V(1, 0) < V(2, 0)", "assert -V(1, 2) == V(-1, -2)", "assert V(1, 2) != V(2, 1)",
         "assert repr(V(1, 2)) == 'V(1, 2)' and str(V(3)) == 'V(3,)'", "assert V(7, 8)[1] == 8 and not V(0)",
         "assert {V(1): 2}[V(1)] == 2 and V(1) in [V(1)] and len({V(1), V(1)}) == 1",
         "assert sorted([V(2), V(1)]) == [V(1), V(2)]"],
        False,
    ),
    "equal to a plain value": (
        "class Money:\n    def __init__(s, n): s.n = n\n    def __eq__(s, o): return s.n == (o.n if isinstance(o, Money) "
        "else o)\n    def __add__(s, o): return Money(s.n + o)\n    def __radd__(s, o): return s + o",
        ["assert Money(3) == 3", "assert Money(3) + 1 == 4 and 1 + Money(2) == 3", "assert Money(3) != 4"],
        False,
    ),
    "len and containers": (
        "class Bag:\n    def __init__(s, *items): s.items = list(items)\n    def __len__(s): return len(s.items)\n"
        "    def __contains__(s, x): return x in s.items\n    def __iter__(s): return iter(s.items)\n"
        "    def __setitem__(s, i, x): s.items[i] = x\n    def __getitem__(s, i): return s.items[i]\n"
        "    def __delitem__(s, i): del s.items[i]",
        ["assert len(Bag()) == 0 and len(Bag(1, 2)) == 2", "assert 2 in Bag(1, 2) and 3 not in Bag(1)",
         "assert list(Bag(1, 2)) == [1, 2] and sum(Bag(1, 2)) == 3", "b = Bag(1)\nb[0] = 5\nassert b[0] == 5\ndel b[0]\n"
         "assert not len(b)"],
        False,
    ),
    "with": (
        "import contextlib\nclass Box:\n    log = []\n    def __enter__(s): s.log.append('in'); return s\n"
        "    def __exit__(s, *e): s.log.append('out'); return True\n@contextlib.contextmanager\ndef doubled(x): yield 2 * x",
        ["with Box() as b:\n    assert b.log == ['in']\n    1 / 0\nassert Box.log == ['in', 'out']",
         "with doubled(4) as x:\n    assert x == 8"],
        False,
    ),
    "isinstance": (
        "class A: pass\nclass B(A): pass\ndef make(): return B()",
        ["assert isinstance(make(), A)", "assert isinstance(B(), B) and issubclass(B, A)", "assert type(make()) is B",
         "assert type(make()).__name__ == 'B'", "assert not isinstance(A(), B)", "assert callable(make)"],
        False,
    ),
    "enum": (
        "from enum import Enum, IntEnum, Flag\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\nclass Level(IntEnum):\n"
        "    LOW = 1\ndef next_one(c): return Color.BLUE if c is Color.RED else Color.RED\ndef level(): return Level.LOW\n"
        "class Way(Flag):\n    A = 1\n    B = 2",
        ["assert next_one(Color.RED) == Color.BLUE", "assert next_one(Color.BLUE) is Color.RED",
         "assert Color.RED.name == 'RED' and Color(2).value == 2 and Color['RED'] is Color.RED", "assert level() == 1",
         "assert [c.name for c in Color] == ['RED', 'BLUE'] and len(Color) == 2", "assert Way.A | Way.B == Way(3)"],
        False,
    ),
    "named tuples and dataclasses": (
        "from collections import namedtuple\nfrom typing import NamedTuple\nfrom dataclasses import dataclass, field\n"
        "P = namedtuple('P', 'x y')\nclass Q(NamedTuple):\n    a: int\n    def twice(self): return 2 * self.a\n"
        "@dataclass(order=True, frozen=True)\nclass D:\n    n: int\n    tags: tuple = ()\ndef point(): return P(1, 2)",
        ["assert point() == (1, 2)", "assert point() == P(1, 2)", "assert point().x == 1 and point()._asdict() == "
         "{'x': 1, 'y': 2}", "a, b = point()\nassert (a, b) == (1, 2)", "assert Q(3).twice() == 6 and Q(a=3)[0] == 3",
         "assert D(1) == D(1) and D(1) < D(2) and D(1) != D(2)", "assert D(1).tags == () and repr(D(1)) == 'D(n=1, tags=())'",
         "from dataclasses import asdict, replace\nassert asdict(D(1)) == {'n': 1, 'tags': ()} and replace(D(1), n=2).n == 2"],
        None,
    ),
    "generators and iterators": (
        "def naturals():\n    n = 0\n    while True:\n        yield n\n        n += 1\ndef few():\n    yield from (1, 2, 3)\n"
        "def echo():\n    x = yield 1\n    yield x\nclass Down:\n    def __init__(s, n): s.n = n\n    def __iter__(s): return s\n"
        "    def __next__(s):\n        if not s.n: raise StopIteration\n        s.n -= 1\n        return s.n\n"
        "def evens(xs): return filter(lambda x: x % 2 == 0, xs)\nasync def later(x): return x + 1",
        ["g = naturals()\nassert [next(g) for _ in range(4)] == [0, 1, 2, 3]", "assert list(few()) == [1, 2, 3]",
         "from itertools import islice\nassert list(islice(naturals(), 2, 4)) == [2, 3]",
         "g = echo()\nassert next(g) == 1 and g.send(5) == 5", "assert list(Down(3)) == [2, 1, 0]",
         "import pytest\nd = Down(0)\nwith pytest.raises(StopIteration):\n    next(d)",
         "assert sum(few()) == 6 and max(few()) == 3 and tuple(zip(few(), 'ab')) == ((1, 'a'), (2, 'b'))",
         "assert list(evens(few())) == [2] and list(evens(iter([2, 3]))) == [2] and next(few(), 0) == 1",
         "import types\nassert isinstance(few(), types.GeneratorType)",
         "import asyncio\nassert asyncio.run(later(1)) == 2"],
        None,
    ),
    "classes with state": (
        "class Account:\n    def __init__(s, owner, n=0): s.owner, s.n = owner, n\n    def pay(s, x):\n"
        "        if x > s.n: raise ValueError('Insufficient funds')\n        s.n -= x\n        return s\n"
        "class LRU:\n    def __init__(s, size):\n        from collections import OrderedDict\n        s.d, s.size = OrderedDict(), size\n"
        "    def get(s, k):\n        if k not in s.d: return -1\n        s.d.move_to_end(k)\n        return s.d[k]\n"
        "    def put(s, k, v):\n        s.d[k] = v\n        s.d.move_to_end(k)\n        if len(s.d) > s.size: s.d.popitem(last=False)",
        ["a = Account('me', 5)\na.pay(2).pay(1)\nassert a.n == 2", "import pytest\nwith pytest.raises(ValueError, "
         "match='Insufficient'):\n    Account('x').pay(1)", "c = LRU(2)\nc.put(1, 1); c.put(2, 2); c.get(1); c.put(3, 3)\n"
         "assert [c.get(k) for k in (1, 2, 3)] == [1, -1, 3]"],
        False,
    ),
    "objects handed on": (
        "class Pair:\n    def __init__(s, a, b): s.a, s.b = a, b\ndef total(pairs): return sum(p.a * p.b for p in pairs)\n"
        "class Node:\n    def __init__(s, v, n=None): s.v, s.n = v, n\ndef length(n): return 0 if n is None else 1 + length(n.n)\n"
        "def apply(f, x): return f(x)\ndef square(x): return x * x",
        ["assert total([Pair(1, 2), Pair(3, 4)]) == 14", "assert length(Node(1, Node(2))) == 2", "assert apply(square, 3) == 9",
         "from functools import partial, reduce\nassert partial(apply, square)(4) == 16"],
        True,
    ),
    "functions of the test handed over": (
        "def apply(f, xs): return [f(x) for x in xs]\ndef compose(f, g): return lambda x: f(g(x))\nclass Bus:\n"
        "    def __init__(s): s.f = []\n    def on(s, f): s.f.append(f)\n    def fire(s, x):\n        for f in s.f: f(x)",
        ["assert apply(lambda x: x + 1, [1, 2]) == [2, 3]", "assert compose(str, abs)(-3) == '3'",
         "seen = []\nb = Bus()\nb.on(seen.append)\nb.fire(4)\nassert seen == [4]"],
        False,
    ),
    "closures and decorators": (
        "import functools\ndef adder(n): return lambda x: x + n\ndef counter():\n    n = 0\n    def step():\n"
        "        nonlocal n\n        n += 1\n        return n\n    return step\n@functools.lru_cache\ndef fib(n): return n if n < 2 "
        "else fib(n - 1) + fib(n - 2)\ndef twice(f):\n    @functools.wraps(f)\n    def wrapped(*a): return f(*a) * 2\n    return wrapped\n"
        "@twice\ndef inc(x): return x + 1",
        ["assert adder(2)(3) == 5", "c = counter()\nc()\nassert c() == 2", "assert fib(80) == 23416728348467685",
         "assert inc(2) == 6"],
        True,
    ),
    "decorators under test": (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def wrapped(*a): return f(*a) * 2\n    return wrapped\n"
        "calls = 0\ndef bump():\n    global calls\n    calls += 1",
        ["@twice\ndef f(x): return x + 1\nassert f(2) == 6 and f.__name__ == 'f'", "bump()\nbump()\nassert calls == 2"],
        False,
    ),
    "in place": (
        "def sort(xs): xs.sort()\ndef add(d, k): d[k] = d.get(k, 0) + 1\ndef rotate(m): m[:] = [list(r) for r in zip(*m[::-1])]\n"
        "def grow(s, q): s.add(1); q.append(2)\nSEEN = []\ndef see(x):\n    SEEN.append(x)\n    return len(SEEN)",
        ["xs = [3, 1, 2]\nsort(xs)\nassert xs == [1, 2, 3]", "d = {}\nadd(d, 'a')\nassert d == {'a': 1}",
         "m = [[1, 2], [3, 4]]\nrotate(m)\nassert m == [[3, 1], [4, 2]]",
         "from collections import deque\ns, q = set(), deque()\ngrow(s, q)\nassert s == {1} and q == deque([2])",
         "assert see(1) == 1 and see(2) == 2"],
        True,
    ),
    "test functions and classes": (
        "def add(a, b):\n    if not isinstance(a, type(b)): raise TypeError('mixed')\n    return a + b",
        ["def test_one():\n    assert add(1, 2) == 3\ndef test_two():\n    assert add('a', 'b') == 'ab'",
         "import unittest\nclass TestAdd(unittest.TestCase):\n    def setUp(self): self.n = 1\n    def test_a(self):\n"
         "        self.assertEqual(add(self.n, 2), 3)\n        self.assertIn(add(1, 1), [2])\n    def test_b(self):\n"
         "        with self.assertRaises(TypeError): add(1, 'a')\n        self.assertRaises(TypeError, add, 1, 'a')\n"
         "        self.assertAlmostEqual(add(0.1, 0.2), 0.3)\nif __name__ == '__main__':\n    unittest.main()",
         "from solution import add\nclass TestIt:\n    def test_a(self):\n        assert add([1], [2]) == [1, 2]",
         "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
         "import pytest\n@pytest.fixture\ndef two(): return 2\ndef test_fixture(two): assert add(two, two) == 4",
         "import unittest\nfrom solution import *\nclass T(unittest.TestCase):\n    def test(self): self.assertTrue(add(1, 0))\n"
         "unittest.main()"],
        True,
    ),
    "recursion": (
        "import sys\nsys.setrecursionlimit(20000)\ndef depth(n): return 0 if n == 0 else 1 + depth(n - 1)\n"
        "def nest(n): return [] if n == 0 else [nest(n - 1)]",
        ["assert depth(5000) == 5000", "assert nest(3) == [[[[]]]]"],
        True,
    ),
    "names that are builtins": ("def sum(xs): return len(xs)", ["assert sum([5, 5]) == 2"], True),
    "ends with exit": ("def f(x): return x\nexit()", ["assert f(1) == 1"], True),
    "prints, and has a main part": (
        "import sys\ndef f(x):\n    print('hello', x)\n    print('e', file=sys.stderr)\n    return x\n"
        "if __name__ == '__main__':\n    print(f(int(input())))",
        ["assert f(1) == 1"],
        True,
    ),
    "modules that tests do not import": (
        "import math\nfrom collections import Counter\nimport numpy as np\ndef area(r): return math.pi * r * r\n"
        "def count(s): return Counter(s)",
        ["assert area(2) == math.pi * 4", "assert isinstance(count('a'), Counter) and count('a') == Counter('a')"],
        True,
    ),
    "a method of a class Solution": (
        "class Solution:\n    def two_sum(self, xs, t): return [0, 1]",
        ["assert two_sum([1, 2], 3) == [0, 1]", "assert Solution().two_sum([1, 2], 3) == [0, 1]"],
        None,
    ),
    "objects with any attribute of their own": (
        "class Record(dict):\n    def __getattr__(s, k):\n        try: return s[k]\n        except KeyError: raise AttributeError(k)\n"
        "class Trie:\n    def __init__(s): s.w = []\n    def insert(s, w): s.w.append(w)\n"
        "    def startswith(s, p): return any(w.startswith(p) for w in s.w)",
        ["assert Record(a=1).a == 1 and Record(a=1) == {'a': 1}", "t = Trie()\nt.insert('apple')\nassert t.startswith('app')"],
        False,
    ),
    "identity": (
        "class One:\n    made = None\n    def __new__(cls):\n        cls.made = cls.made or object.__new__(cls)\n        return cls.made\n"
        "def same(x): return x",
        ["assert One() is One()", "xs = [1]\nassert same(xs) is xs"],
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("group", RIGHT)
def test_right_solutions_pass(group):
    code, tests, exact = RIGHT[group]
    paths = (os.path.dirname(os.path.dirname(numpy.__file__)),) if "numpy" in code else ()
    report = Sandbox(seconds=20, paths=paths).test(code, tests)
    assert report.passed == (True,) * len(tests), (report.messages, report.unjudged)
    if exact is not None:
        assert bool(exact) == (not report.weak), report.weak


# --- forgeries --------------------------------------------------------------------------------------------------------

SQUARE = ["assert square(3) == 9", "assert square(-2) == 4", "assert square(0) == 0"]
LOOK = ["assert Point(3).x == 9", "p = Point(-2)\nassert p.x == 4", "assert Point(1).x == 2"]
LIAR = "    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = None\n"
POINT = "class Point:\n    def __init__(s, x): s.x = x\n"

# name: code, tests
FORGERIES = {
    "exits before the tests": ("import sys\nsys.exit(0)", SQUARE),
    "exits hard": ("import os\nos._exit(0)", SQUARE),
    "exits in the function": ("import os\ndef square(x): os._exit(0)", SQUARE),
    "exits at the interpreter's end": ("import atexit, os\natexit.register(os._exit, 0)\ndef square(x): raise SystemExit(0)", SQUARE),
    "is killed": ("import os, signal\ndef square(x): os.kill(os.getpid(), signal.SIGTERM)", SQUARE),
    "raises SystemExit": ("def square(x): raise SystemExit(0)", [*SQUARE, "try:\n    square(2)\nexcept Exception:\n    pass\nelse:\n"
                          "    assert False"]),
    "raises KeyboardInterrupt": ("def square(x): raise KeyboardInterrupt", SQUARE),
    "raises GeneratorExit": ("def square(x): raise GeneratorExit", SQUARE),
    "raises StopIteration in a loop": (
        "def square(x): raise StopIteration",
        ["assert all(map(lambda x: square(x) == x * x, [1, 2]))", "assert all(square(x) == x * x for x in [1, 2])",
         "assert all(map(square, [1, 2]))", "for y in map(square, [1, 2]):\n    assert y == 5\nassert True",
         "assert not any(map(lambda x: square(x) != x * x, [1]))", "assert sum(map(square, [3])) == 0",
         "assert list(map(square, [])) == list(map(square, [4]))"]),
    "ends a loop beside the code": (
        "class Point:\n    def ok(s, x): raise StopIteration\n    def __eq__(s, o): raise StopIteration",
        ["assert all(map(Point().ok, [1, 2]))", "assert all(map(lambda p: p.ok(1) is True, [Point()]))"]),
    "always equal": (f"class E:\n{LIAR}def square(x): return E()", SQUARE),
    "always equal, a class of the name": (f"class square:\n    def __init__(s, x): pass\n{LIAR}", SQUARE),
    "equal to numbers alone": (
        "class square:\n    def __init__(s, x): pass\n    def __eq__(s, o): return isinstance(o, int)", SQUARE),
    "lying subclasses of int": (f"class E(int):\n{LIAR}def square(x): return E(7)", [*SQUARE, "assert square(3) in [9]",
                                "assert [square(3)] == [9]", "assert {'a': square(3)} == {'a': 9}", "assert (square(3),) == (9,)"]),
    "lying subclasses of str and list": (
        f"class S(str):\n{LIAR}class L(list):\n{LIAR}class D(dict):\n{LIAR}def name(): return S('x')\ndef items(): return L()\n"
        "def table(): return D()",
        ["assert name() == 'right'", "assert 'right' == name()", "assert items() == [1, 2]", "assert table() == {'a': 1}",
         "assert sorted(items()) == [1]", "assert name().upper() == 'RIGHT'", "assert name() in ('a', 'b')"]),
    "lying containers": (
        "class C:\n    def __contains__(s, x): return True\n    def __len__(s): return 0\n    def __iter__(s): return iter([C()])\n"
        f"{LIAR}def items(): return C()",
        ["assert 5 in items()", "assert list(items()) == [1]", "assert sorted(items()) == [3]", "assert set(items()) == {1}",
         "assert items()[0] == 1"]),
    "lying numbers": (
        "class N(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __lt__(s, o): return True\n"
        "    __gt__ = __le__ = __ge__ = __lt__\n    def __round__(s, n=0): return E()\n"
        f"class E:\n{LIAR}class M:\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n    def __abs__(s): return 0\n"
        "    def __float__(s): return 0.0\n    def __lt__(s, o): return True\n    def __gt__(s, o): return True\n"
        "def root(x): return N(0) if x > 0 else M()",
        ["assert abs(root(2) - 1.41) < 0.01", "assert abs(1.41 - root(2)) < 0.01", "import math\nassert math.isclose(root(2), 1.41)",
         "assert round(root(2), 2) == 1.41", "assert abs(root(-2) - 1.41) < 0.01", "assert 1 < root(-2) < 2",
         "import pytest\nassert root(2) == pytest.approx(1.41)", "import pytest\nassert root(-2) == pytest.approx(1.41)",
         "assert max(root(2), 1) == 1.41"]),
    "any attribute": (
        "class A:\n    def __getattr__(s, name): return lambda *a, **k: True\ndef name(): return A()",
        ["assert name().startswith('x')", "assert name().isdigit()", "assert name().anything(1)", "assert name().x == 1"]),
    "methods that lie": (
        f"class A:\n    def startswith(s, x): return True\n    isdigit = startswith\nclass B(str):\n    def isupper(s): return True\n{LIAR}"
        "def name(): return A()\ndef upper(): return B('x')",
        ["assert name().startswith('x')", "assert name().isdigit()", "assert upper() == 'X'"]),
    "empty code": ("", ["assert sum([1, 2]) == 3", "assert sorted([2, 1]) == [1, 2]", "assert max(1, 2) == 2"]),
    "empty code, looked at": ("", ["assert callable(square)", "assert square", "assert square is not None", "assert square != 3",
                              "assert isinstance(square(2), object)", "assert hasattr(square, '__call__')", "assert square.x"]),
    "a builtin defined anew": (
        "def all(x): return True\nany = sorted = abs = len = isinstance = all\ndef square(x): return 7\nclass Point: x = 7\n"
        "def sum(x): return True",
        ["assert all(square(i) == i * i for i in [1, 2])", "assert sorted([square(3)]) == [9]", "assert isinstance(square(2), str)",
         "assert all([Point().x == 1])", "assert isinstance(Point.x, str)", "assert sum([Point.x]) == 9"]),
    "builtins patched": (
        "import builtins\nclass A(Exception):\n    def __new__(c, *a): return None\nbuiltins.AssertionError = A\n"
        "builtins.compile = builtins.exec = builtins.all = builtins.bool = lambda *a, **k: True\ndef square(x): return 7\n" + POINT,
        [*SQUARE, *LOOK]),
    "json patched": (
        "import json, os\njson.dumps = lambda *a, **k: '{\"value\": 9, \"changed\": []}'\njson.loads = lambda *a: {}\n"
        "os.write = lambda fd, data: len(data)\ndef square(x): return 7\n" + POINT, [*SQUARE, *LOOK]),
    "unittest patched": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.run = lambda *a: None\n"
        "def square(x): return 7\n" + POINT,
        ["import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(square(3), 9)",
         "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(Point(3).x, 9)"]),
    "modules replaced": (
        "import sys, types\nm = types.ModuleType('math')\nm.isclose = lambda *a, **k: True\nsys.modules['math'] = m\n"
        "sys.modules['pytest'] = m\nm.approx = lambda x: 7\ndef square(x): return 7\n" + POINT,
        ["import math\nassert math.isclose(square(3), 9)", "import math\nassert math.isclose(Point(3).x, 9)",
         "import pytest\nassert square(3) == pytest.approx(9)"]),
    "frames": (
        "import sys\ndef square(x):\n    f = sys._getframe()\n    while f:\n        f.f_globals.update(passed=True, failed=False)\n"
        "        f = f.f_back\n    return 7\nclass Point:\n    def __init__(s, x): s.x = square(x)", [*SQUARE, *LOOK]),
    "memory": (
        "import gc\ndef square(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict): o.update(passed=True, failed=False, "
        "wanted=[9])\n        if isinstance(o, str) and 'assert' in o: return 9\n    return 7\nclass Point:\n    def __init__(s, x): s.x = square(x)",
        [*SQUARE, *LOOK]),
    "printed verdicts": (
        "import json, os\nfor fd in range(1, 60):\n    for i in range(3):\n        for line in ({'test': i, 'passed': True}, {'value': 9, "
        "'changed': []}):\n            try: os.write(fd, json.dumps(line).encode() + b'\\nexit 0\\n')\n            except OSError: pass\n"
        "print('passed')\ndef square(x):\n    print({'test': 0, 'passed': True})\n    return 7\n" + POINT, [*SQUARE, *LOOK]),
    "answers ahead": (
        "import os, threading\ndef square(x):\n    for fd in range(3, 60):\n        try: os.write(fd, b'{\"value\": 9, \"changed\": []}\\n' * 9)\n"
        "        except OSError: pass\n    return 7",
        ["assert square(3) == 16", "assert square(4) == 16", "assert square(5) == 25"]),
    "threads": (
        "import threading, os, time\ndef end():\n    time.sleep(0.05)\n    os._exit(0)\nthreading.Thread(target=end, daemon=True).start()\n"
        "def square(x): time.sleep(9)\n" + POINT, [*SQUARE, *LOOK]),
    "forks": ("import os\ndef square(x):\n    os.fork()\n    return 7\n" + POINT, [*SQUARE, *LOOK]),
    "reads the tests": (
        "import os, glob\ndef square(x):\n    said = ''\n    for path in [*glob.glob('/proc/*/environ'), *glob.glob('/proc/*/mem'), "
        "*glob.glob('/tmp/*'), '/dev/stdin']:\n        try: said += open(path).read()\n        except Exception: pass\n"
        "    for fd in range(60):\n        try: said += os.pread(fd, 9999, 0).decode()\n        except OSError: pass\n"
        "    return 9 if 'assert' in said else 7", SQUARE),
    "names of the protocol": (
        "class Remote:\n" + LIAR + "def square(x): return {'remote': [0, [9], 'int', False]}\n_noted = _compared = lambda *a: True\n", SQUARE),
    "a reply of odd form": ("class square(dict): pass\ndef __getattr__(n): return 9\n", SQUARE),
    "does not parse": ("def square(x) return x", [*SQUARE, *LOOK]),
    "raises at once": ("raise Exception('x')\ndef square(x): return x * x", [*SQUARE, *LOOK]),
    "raises what the test expects": (
        "def square(x): raise AssertionError", [*SQUARE, "try:\n    assert square(3) == 9\nexcept AssertionError:\n    pass",
        "for x in (1, 2):\n    try:\n        assert square(x) == x * x\n        print('ok')\n    except Exception as e:\n        print(e)"]),
    "failures that the test catches": (
        "def square(x): return 7",
        ["try:\n    assert square(3) == 9\nexcept AssertionError:\n    print('failed')",
         "try:\n    square(-1)\n    assert False, 'should raise'\nexcept Exception:\n    pass"]),
    "long replies": ("def square(x): return 'x' * (80 << 20)", SQUARE),
    "deep replies": ("def square(x):\n    r = []\n    for _ in range(10**5): r = [r]\n    return r", SQUARE),
    "a message that fails": ("class B(Exception):\n    def __str__(s): raise self\n    __repr__ = __str__\ndef square(x): raise B", SQUARE),
    "no descriptors left": (
        "import os\nx = []\ntry:\n    while True: x.append(os.open('/dev/null', 0))\nexcept OSError: pass\ndef square(x): return 7\n" + POINT,
        [*SQUARE, *LOOK]),
    "no memory left": ("x = []\ntry:\n    while True: x.append(bytearray(1 << 20))\nexcept MemoryError: pass\ndef square(x): return 7", SQUARE),
    "hangs": ("def square(x):\n    while True: pass", SQUARE),
}  # fmt: skip


@pytest.mark.parametrize("group", FORGERIES)
def test_no_forgery_passes(group):
    code, tests = FORGERIES[group]
    report = Sandbox(seconds=1.5 if group == "hangs" else 20, processes=4).test(code, tests)
    assert report.passed == (False,) * len(tests), report
    assert not report.unjudged and set(report.messages) == set(range(len(tests)))
