"""What runs inside the sandbox, without rights and under limits: a program, or code and its tests. Standard library
alone."""

import builtins
import sys

import candidate
import judge

ROOM = ("candidate", "exact", "filter", "judge", "payload", "stand_in", "translate", "weak", "wire")


def run(job):
    builtins.exit = builtins.quit = sys.exit  # the interpreter starts without `site`, which makes these
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the limit of CPU seconds is enough
    for name in ROOM:
        sys.modules.pop(name, None)
    if job["mode"] == "tests":
        judge.judge()
    else:
        sys.argv = ["program.py"]
        candidate.module_of(job["code"], "__main__")
