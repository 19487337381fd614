"""A process that compares mathematical answers: one JSON line in, one out. It is killed when it takes too long.

math-verify's own timeouts rest on signals, which fail outside of a main thread and then score 0 in silence; they are
switched off. Nothing here is evaluated as Python: math-verify parses LaTeX and expressions with a grammar.
"""

import functools
import json
import os
import resource
import sys

MEMORY = 4 << 30  # bytes of address space: a power tower dies here, not the trainer


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no reply
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
    for line in sys.stdin:
        try:
            reply = judge(*json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
