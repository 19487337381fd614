"""What runs inside the sandbox, without rights and under limits: a program, or code and its tests. Standard library
alone."""

import builtins
import os
import sys

import candidate
import judge
import programs

ROOM = [name.removesuffix(".py") for name in os.listdir(os.path.dirname(os.path.abspath(__file__)))]


def run(job):
    builtins.exit = builtins.quit = sys.exit  # the interpreter starts without `site`, which makes these
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the limit of CPU seconds is enough
    for name in ROOM:
        sys.modules.pop(name, None)
    if job["mode"] == "program":
        candidate.run_program(job["code"])
        return
    reports = os.dup(1)
    try:
        if job["mode"] == "programs":
            programs.run_all(reports)
        else:
            judge.judge(reports, job["servers"])
    finally:
        os._exit(0)
