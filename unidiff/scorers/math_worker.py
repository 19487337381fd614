"""A process that compares mathematical answers: one JSON line in, one JSON line out. Its parent kills it after a
timeout; without a parent it ends by itself a little later.

math-verify's own timeouts are switched off: they use signals, which fail outside of the main thread and then silently
score 0. Nothing is evaluated as Python: math-verify parses LaTeX and expressions with a grammar.
"""

import ctypes
import functools
import json
import math
import os
import resource
import signal
import sys

START_SECONDS = 120.0  # timeout of importing sympy on a busy machine
GRACE_SECONDS = 5
SET_DUMPABLE = 4
MEMORY = 4 << 30  # bytes of address space: a power tower kills this process, not the trainer


def clock(seconds: float) -> None:
    """Ends this process after `seconds` plus grace, by an unhandled SIGALRM, unless called again. 0 stops the clock."""
    signal.alarm(math.ceil(seconds + GRACE_SECONDS) if seconds else 0)


def main() -> None:
    clock(START_SECONDS)
    if sys.platform == "linux":  # keeps other processes of this user, such as judged code, from its descriptors
        ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that libraries print must not become a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import math_verify
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return

    parse = functools.partial(math_verify.parse, **{"parsing_timeout": None})

    def judge(golds: list[str], answers: list[str], last_resort: str, same: bool) -> dict:
        """Whether any reading of the answer equals the right answer (its first reading that can be parsed). same: the
        texts are equal, so nothing is parsed."""
        if same:
            return {"value": 1.0}
        known = next(filter(None, map(parse, golds)), None)
        if not known:
            return {"error": f"the right answer {golds[-1][:100]!r} is not understood"}
        given = list(filter(None, map(parse, answers))) or [parse(last_resort)]
        return {"value": float(any(math_verify.verify(known, one, timeout_seconds=None) for one in given))}

    print(json.dumps({"ready": True}), file=replies, flush=True)
    clock(0)
    for line in sys.stdin:
        seconds, *request = json.loads(line)
        clock(seconds)
        try:
            reply = judge(*request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        clock(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
