"""Runs a program once for each input, every run in a process of its own. What it should print is not known here."""

import json
import math
import os
import resource
import selectors
import signal
import sys
import time

import candidate


def run_all(text, reports):
    """Reads the job: {"code", "inputs", "seconds", "output"}. One line a run goes to reports."""
    job = json.load(text)
    candidate.silence()
    for number, text in enumerate(job["inputs"]):
        report = run(job, number, text.encode("utf-8", "surrogatepass"))
        candidate.send(reports, json.dumps(report).encode() + b"\n")
        candidate.reap()


def run(job, number, stdin):
    """What a run printed, and how it ended."""
    given, printed = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        become_program(job, number, given[0], printed[1])
    os.close(given[0])
    os.close(printed[1])
    output, late = exchange(given[1], printed[0], stdin, time.monotonic() + job["seconds"], job["output"])
    if late:
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stop = late or ("exited" if code >= 0 else "signal")
    return {"stdout": output.decode(errors="replace"), "stop": stop, "code": code}


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
        sys.stdout.flush()
    finally:
        os._exit(code & 255)


def exchange(stdin, stdout, text, deadline, most):
    """Writes the input and reads what is printed, side by side. Gives that, and why the run has to be stopped."""
    os.set_blocking(stdin, False)
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        selector.register(stdin, selectors.EVENT_WRITE)
        while stdout in selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for key, _ in ready:
                if key.fd == stdin:
                    try:
                        text = text[os.write(stdin, text[: 1 << 16]) :] if text else text
                    except BrokenPipeError:
                        text = b""
                    if not text:
                        selector.unregister(stdin)
                        os.close(stdin)
                elif chunk := os.read(stdout, 1 << 16):
                    output += chunk
                else:
                    selector.unregister(stdout)
            if len(output) > most:
                break
        late = "output" if len(output) > most else "timeout" if stdout in selector.get_map() else None
        if stdin in selector.get_map():
            os.close(stdin)
    os.close(stdout)
    return output[:most], late
