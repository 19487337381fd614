"""Runs a program once for each input, every run in a process of its own. What it should print is not known here."""

import atexit
import json
import math
import os
import resource
import signal
import sys
import time

import candidate
import streams


def run_all(text, reports):
    """Reads the job: {"code", "inputs", "seconds", "output"}. One line a run goes to reports."""
    job = json.load(text)
    candidate.silence()
    for number, given in enumerate(job["inputs"]):
        report = run(job, number, given.encode("utf-8", "surrogatepass"))
        candidate.send(reports, json.dumps(report).encode() + b"\n")
        candidate.reap()


def run(job, number, given):
    """What a run printed, and how it ended."""
    stdin, (printed, stdout) = reading(given), os.pipe()
    child = os.fork()
    if child == 0:
        become_program(job, number, stdin, stdout)
    os.close(stdin)
    os.close(stdout)
    said, late = streams.read({printed: job["output"]}, time.monotonic() + job["seconds"])
    os.close(printed)
    if late:
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stop = late or ("exited" if code >= 0 else "signal")
    return {"stdout": said[printed][: job["output"]].decode(errors="replace"), "stop": stop, "code": code}


def reading(text):
    """A pipe from which the text can be read. What it does not hold at once is written by a process of its own."""
    end, start = os.pipe()
    if len(text) <= streams.CHUNK:
        os.write(start, text)
    elif os.fork() == 0:
        try:
            os.close(end)
            candidate.send(start, text)
        finally:
            os._exit(0)
    os.close(start)
    return end


def become_program(job, number, stdin, stdout):
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, 1 << 16)
        most = math.ceil(job["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        os.mkdir(str(number))
        os.chdir(str(number))
        candidate.run_program(job["code"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        code = 1
    try:
        wait_for_threads()
    finally:
        os._exit(code & 255)


def wait_for_threads():
    """What Python does at its end, but for the destruction of all objects, which takes long."""
    if "threading" in sys.modules:
        vars(sys.modules["threading"])["_shutdown"]()
    atexit._run_exitfuncs()
    sys.stdout.flush()
