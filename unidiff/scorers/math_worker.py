"""A process that compares mathematical answers: one JSON line in, one out. It is killed when it takes too long,
and ends by itself a little later if there is nobody to kill it.

math-verify's own timeouts rest on signals, which fail outside of a main thread and then score 0 in silence; they are
switched off. Nothing here is evaluated as Python: math-verify parses LaTeX and expressions with a grammar.
"""

import ctypes
import functools
import json
import math
import os
import resource
import signal
import sys

START_SECONDS = 120.0  # to import sympy, on a machine that is busy
GRACE_SECONDS = 5
SET_DUMPABLE = 4
MEMORY = 4 << 30  # bytes of address space: a power tower dies here, not the trainer


def clock(seconds: float) -> None:
    """Ends this process then, unless the clock is set again: nothing handles the signal. 0 stops the clock."""
    signal.alarm(math.ceil(seconds + GRACE_SECONDS) if seconds else 0)


def main() -> None:
    clock(START_SECONDS)
    if sys.platform == "linux":  # its descriptors are closed to others of its user, such as code that is judged
        ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import math_verify
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return

    parse = functools.partial(math_verify.parse, **{"parsing_timeout": None})

    def judge(golds: list[str], answers: list[str], last_resort: str, same: bool) -> dict:
        """Whether a reading of the answer is the first reading of the right one that is understood. same: their texts
        are the same, so there is nothing to understand."""
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
