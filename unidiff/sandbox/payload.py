"""What runs inside the sandbox, without rights and under limits: a program, or code and its tests. Standard library
alone."""

import builtins
import os
import sys

import candidate
import judge
import programs
import stand_in

TEXT = 3  # the descriptor that it reads: a program, or a job as JSON
ROOM = [name.removesuffix(".py") for name in os.listdir(os.path.dirname(os.path.abspath(__file__)))]


def run(job):
    builtins.exit = builtins.quit = sys.exit  # the interpreter starts without `site`, which makes these
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # the limit of CPU seconds is enough
    sys.meta_path.append(stand_in.Finder())
    for name in ROOM:
        sys.modules.pop(name, None)
    with open(TEXT, "rb") as text:
        if job["mode"] == "program":
            code = text.read().decode("utf-8", "surrogatepass")
        else:
            try:
                {"programs": programs.run_all, "tests": judge.judge}[job["mode"]](text, os.dup(1))
            finally:
                os._exit(0)
    candidate.run_program(code)
