"""The side of the code under test: runs it, then answers calls of its functions. It never sees a test."""

import builtins
import contextlib
import itertools
import json
import os
import signal
import sys
import types

import wire

LONGEST_ITERATOR = 100_000


def module_of(code, name):
    """A new module in which the code has run. `exit()` is the end of the code, not a fault."""
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"
    sys.modules[name] = module
    try:
        exec(compile(code, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        if name == "__main__":
            raise
    return module


def run_program(code):
    """The code as the main module. Its end is the end of the process."""
    sys.argv = ["program.py"]
    module_of(code, "__main__")


def found(module, name):
    """What a name means: something of the module, or a method of its class `Solution`. NameError if neither."""
    if name in module.__dict__:
        return module.__dict__[name]
    solution = module.__dict__.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"name {name!r} is not defined by the code")


def fork_server():
    """Forks a process for code, before anything here knows of tests. Gives its id, where it reads, what it says."""
    requests, replies = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            alone(requests[0], replies[1])
            serve(os.fdopen(requests[0], "rb"), replies[1])
        finally:
            os._exit(0)
    os.close(requests[0])
    os.close(replies[1])
    return child, requests[1], os.fdopen(replies[0], "rb")


def serve(requests, replies):
    """The code is the first line of the requests; the others are calls and questions for names."""
    code, server, failure = json.loads(requests.readline()), None, None
    try:
        server = Server(module_of(code, "solution"))
    except BaseException as error:
        failure = fault(error)
    signal.signal(signal.SIGUSR1, interrupt)
    for line in requests:
        try:
            reply = json.dumps(server.answer(json.loads(line)) if server else failure)
        except (RecursionError, ValueError, MemoryError) as error:
            reply = json.dumps(fault(error))
        send(replies, reply.encode() + b"\n")


class Interrupted(BaseException):
    """A call has taken too long."""


def interrupt(*_):
    raise Interrupted


class Server:
    """Answers requests. kept: what is not plain and the tests can hand back, by number."""

    def __init__(self, module):
        self.module, self.kept = module, []

    def answer(self, request):
        """What a call gave or raised, what it changed of its arguments, and whether the code keeps any of these."""
        if "defined" in request:
            return {"defined": [name for name in request["defined"] if defines(self.module, name)]}
        keep = wire.refuse if request["items"] else self.keep
        try:
            parts = ("call", "args", "named")
            function, arguments, named = (wire.decode(request[part], self.find) for part in parts)
            result, reply = called(function, arguments, named)
            given = {**dict(enumerate(arguments)), **named}
            sent = dict(enumerate(request["args"])) | dict(request["named"]["dict"])
            after = {place: wire.encode(one, keep) for place, one in given.items() if wire.can_change(one)}
            changed = [[place, one] for place, one in after.items() if one != sent[place]]
            same = [place for place, one in given.items() if type(one) in wire.MUTABLE and result and one is result[0]]
            if same:  # the test gets its own argument back
                result, reply = [], {"same": same[0]}
            del given
            shared = wire.shared(arguments, named, result)
            for value in result:
                if request["items"] and hasattr(type(value), "__next__"):
                    value = list(itertools.islice(value, LONGEST_ITERATOR))
                reply = {"value": wire.encode(value, keep)}
            return {**reply, "changed": changed, "shared": shared}
        except wire.NotPlain as why:
            return {"not_plain": f"the result: {why}"}
        except BaseException as error:
            return fault(error)

    def find(self, name):
        return found(self.module, name) if isinstance(name, str) else self.kept[name]

    def keep(self, value):
        place = next((i for i, one in enumerate(self.kept) if one is value), len(self.kept))
        self.kept[place:] = self.kept[place:] or [value]
        return {"name": [place]}


def called(function, arguments, named):
    """What a call gives, in a list; empty if it raises. And what it raises, as a reply."""
    try:
        return [function(*arguments, **named)], {}
    except BaseException as error:
        return [], fault(error)


def defines(module, name):
    try:
        found(module, name)
    except NameError:
        return False
    return True


def fault(error):
    """An exception of a builtin class, with its arguments. Any other, or one with a cause or notes, is not plain."""
    kind = type(error)
    more = error.__cause__ is not None or hasattr(error, "__notes__") or isinstance(error, BaseExceptionGroup)
    if vars(builtins).get(kind.__name__) is not kind or more:
        return {"not_plain": f"the code raised a {kind.__name__}"}
    try:
        message = str(error)[:500]
        arguments = wire.encode(list(error.args), lambda value: repr(value)[:500])
    except BaseException:
        message, arguments = "", []
    return {"error": kind.__name__, "arguments": arguments, "message": message}


def send(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def alone(*kept):
    """Closes all descriptors but these; standard streams lead nowhere."""
    first = 3
    for fd in [*sorted(kept), 1 << 16]:
        os.closerange(first, fd)
        first = fd + 1
    silence()


def reap():
    """Forgets children that have ended: orphans come to the first process of the sandbox."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def silence():
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
