"""What the syntax tree of a test says: whether it asserts, what it uses of the code, and how it is run."""

import ast
import builtins
import symtable
import sys
import types
import warnings

MODULES = {"np": "numpy", "pd": "pandas"}  # names that tests use without an import
HELPERS = {
    name: module for module, names in {
        "math": "isclose isnan isinf fabs", "copy": "deepcopy", "decimal": "Decimal", "fractions": "Fraction",
        "collections": "Counter OrderedDict defaultdict deque namedtuple", "functools": "partial",
        "datetime": "datetime timedelta date", "io": "StringIO", "contextlib": "redirect_stdout suppress",
        "typing": "List Dict Tuple Set Optional Any Union Callable", "pytest": "approx raises",
    }.items() for name in names.split()
}  # fmt: skip
METHODS = {  # of unittest's TestCase, and the operators that they ask
    f"assert{name}": operator for operator, names in {
        "Eq": "Equal AlmostEqual ListEqual TupleEqual DictEqual SetEqual", "NotEq": "NotEqual", "In": "In",
        "NotIn": "NotIn", "Gt": "Greater", "GtE": "GreaterEqual", "Lt": "Less", "LtE": "LessEqual",
    }.items() for name in names.split()
}  # fmt: skip
MARK = "\0unidiff "
SOLUTION = "solution"  # tests may import the code under this name
BUILTINS = frozenset(dir(builtins))
GENUINE = frozenset(name for name in BUILTINS - {"super"} if not name.startswith("__"))  # the compiler looks for super
CONSTRUCTORS = {"list", "set", "tuple", "dict", "int", "float", "str", "bool", "complex", "range", "frozenset", "bytes"}
LOOKS = {"callable", "type", "id", "hasattr", "getattr"}  # what these answer, the object is not always asked
STATE = """stdin stdout stderr redirect_stdout redirect_stderr environ putenv chdir patch seed setstate
setrecursionlimit set_int_max_str_digits getcontext setcontext localcontext setlocale catch_warnings simplefilter
filterwarnings warns assertWarns assertWarnsRegex assertLogs getLogger basicConfig Thread ThreadPoolExecutor"""
OF_INTERPRETERS = frozenset(STATE.split())  # what tests set or read for the code, in its interpreter alone
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Piece:
    """A test or the set-up. names: what it uses and does not define. Raises SyntaxError, ValueError, RecursionError."""

    def __init__(self, text):
        self.text, self.tree = text, ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        from_code = [n for n in self.nodes if isinstance(n, ast.ImportFrom) and n.module == SOLUTION]
        self.imports = {alias.asname or alias.name: alias.name for node in from_code for alias in node.names}
        self.used, self.defined = set(self.imports), set()
        if any(alias.name == SOLUTION for n in self.nodes if isinstance(n, ast.Import) for alias in n.names):
            self.used.add(SOLUTION)
        tables = [top := symtable.symtable(text, "test", "exec")]
        while tables:
            table = tables.pop()
            tables += table.get_children()
            for symbol in table.get_symbols():
                if table is top or symbol.is_global():
                    if symbol.is_referenced():
                        self.used.add(symbol.get_name())
                    if symbol.is_assigned() or symbol.is_imported():
                        self.defined.add(symbol.get_name())
        self.defined -= self.imports.keys()
        self.names = self.used - self.defined - BUILTINS | self.imports.keys() - {"*"}
        self.definitions = {node.name: node for node in self.tree.body if isinstance(node, DEFINITIONS)}
        self.statements = [node for node in self.tree.body if not isinstance(node, DEFINITIONS)]
        called = {name_of(n.func) for s in self.statements for n in ast.walk(s) if isinstance(n, ast.Call)}
        self.cases = [name for name, node in self.definitions.items() if name not in called and is_case(node)]


def is_case(node):
    """Whether a definition is a test function or class."""
    bases = [name_of(base) or "" for base in getattr(node, "bases", ())]
    return node.name.lower().startswith("test") or any("TestCase" in base for base in bases)


def fixtures(test, setup):
    """Parameters of test functions that nothing gives."""
    for node in map(test.definitions.get, test.cases):
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            yield from {one.arg for one in node.args.args} - test.definitions.keys() - setup.definitions.keys()


def name_of(node):
    """The last name of `a.b.c`; None for other expressions."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def asserts(test, setup):
    """Whether anything that the test runs can fail by its own judgement."""
    known = {node.name: node for node in setup.nodes + test.nodes if isinstance(node, DEFINITIONS)}
    todo = test.statements + [test.definitions[name] for name in test.cases]
    while todo:
        for node in ast.walk(todo.pop()):
            called = (name_of(node.func) or "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Assert | ast.Raise) or called.lower().startswith(("assert", "fail", "raises")):
                return True
            name = name_of(node)
            if name is not None and name in known:
                todo.append(known.pop(name))
    return False


def tested_builtins(pieces):
    """The builtin functions that tests call which use nothing else of the code: the innermost calls of each."""
    found = set()
    for piece in pieces:
        calls = [node for node in piece.nodes if callee(node) in BUILTINS - CONSTRUCTORS]
        found |= {callee(n) for n in calls if not any(m is not n and m in calls for m in ast.walk(n))}
    return found - set().union(*(piece.defined for piece in pieces))


def callee(node):
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def shares_interpreter(piece):
    """Why a test cannot be run apart from the code, where that would not show. None if it can."""
    if SOLUTION in piece.used:
        return "it imports the module of the code"
    for node in piece.nodes:
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            if not all(isinstance(o, ast.Constant) or getattr(o, "id", "") in BUILTINS for o in node.comparators):
                return "it compares identities"
        elif {getattr(node, "attr", None), getattr(node, "name", None), callee(node)} & OF_INTERPRETERS:
            return "it sets or reads what belongs to the code's interpreter"
    return None


def modules(pieces, code):
    """What tests use of Python's library without an import: `math.pi`, `isclose`. Import statements by name.

    The name of a library's class or function means that one, unless nothing else is under test and the code defines it.
    """
    found = {}
    for piece in pieces:
        for node in piece.nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in piece.names:
                name = node.value.id
                module = MODULES.get(name, name if name in sys.stdlib_module_names else "")
                if module and hasattr(library(module), node.attr):
                    found[name] = f"import {module} as {name}"
    names = set().union(*(piece.names for piece in pieces)) - found.keys()
    others = names - HELPERS.keys() - set().union(*(piece.defined for piece in pieces))
    for name in names & HELPERS.keys():
        if others or name not in getattr(code, "definitions", ()):
            found[name] = f"from {HELPERS[name]} import {name}"
    return found


def library(name):
    """A module that can be imported, or None."""
    try:
        return __import__(name)
    except ImportError:
        return None


class Noted(ast.NodeTransformer):
    """`assert x` becomes `assert noted(begun(swallowed), x)`: if it has failed, the test has, even where its own
    `except` takes the error; and where that takes any error, also if the condition was never known."""

    swallowed = False

    def visit_Assert(self, node):
        self.generic_visit(node)
        node.test = call("noted", call("begun", ast.Constant(int(self.swallowed))), node.test)
        return node

    def visit_Try(self, node):
        outer, self.swallowed = self.swallowed, self.swallowed or any(map(swallows, node.handlers))
        node.body = [self.visit(one) for one in node.body]
        self.swallowed = outer
        for part in (node.handlers, node.orelse, node.finalbody):
            part[:] = [self.visit(one) for one in part]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if callee(node) in LOOKS:
            node.args = [call("seen", argument) for argument in node.args]
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if isinstance(node.ops[0], ast.Is | ast.IsNot):
            node.left = call("seen", node.left)
        return node

    def visit_ImportFrom(self, node):
        return ast.Pass() if node.module == SOLUTION else node


def swallows(handler):
    """Whether an `except` takes failed assertions and does nothing about them."""
    kinds = {name_of(node) for node in ast.walk(handler.type)} if handler.type else {"BaseException"}
    known = kinds & {"Exception", "BaseException", "AssertionError"}
    return bool(known) and not any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(handler))


class Guarded(Noted):
    """For tests beside the code: what is asked of its objects is asked through weak.py, and builtins are genuine."""

    def __init__(self, own):
        self.own = own  # names that are not builtins here

    def visit_Compare(self, node):
        self.generic_visit(node)
        operators = ast.Tuple([ast.Constant(type(op).__name__) for op in node.ops], ast.Load())
        return call("compared", operators, node.left, *node.comparators)

    def visit_Call(self, node):
        operator = METHODS.get(name_of(node.func) or "")
        self.generic_visit(node)
        if operator and len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args):
            both = call("operands", ast.Constant(operator), *node.args[:2])
            node.args[:2] = [ast.Starred(both, ast.Load())]
        return call("given", node)

    def visit_Subscript(self, node):
        self.generic_visit(node)
        return call("given", node) if isinstance(node.ctx, ast.Load) else node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return call("computed", ast.Constant(type(node.op).__name__), node.left, node.right)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load) or (node.attr.startswith("__") and not node.attr.endswith("__")):
            return node  # a class of the test renames it
        return call("attribute", node.value, ast.Constant(node.attr))

    def visit_Name(self, node):
        genuine = isinstance(node.ctx, ast.Load) and node.id in GENUINE and node.id not in self.own
        return object_named(node.id) if genuine else node

    def visit_MatchValue(self, node):  # the grammar wants a plain attribute here
        return node

    def visit_MatchClass(self, node):
        return node


def object_named(name):
    """Stands for an object that the test gets with its compiled code. In a namespace the code under test could replace
    it."""
    return ast.Constant(MARK + name)


def call(name, *arguments):
    return ast.Call(object_named(name), list(arguments), [])


def program(piece, transformer, objects):
    """The compiled test. objects: what the transformer's names stand for."""
    tree = ast.fix_missing_locations(transformer.visit(ast.parse(piece.text)))
    with warnings.catch_warnings(action="ignore"):  # a constant is called
        return filled(compile(tree, "test", "exec", dont_inherit=True), objects)


def filled(constant, objects):
    """A constant of compiled code with objects in their places."""
    if isinstance(constant, str) and constant.startswith(MARK):
        return objects[constant.removeprefix(MARK)]
    if isinstance(constant, tuple | frozenset):
        return type(constant)(filled(one, objects) for one in constant)
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=filled(constant.co_consts, objects))
    return constant
