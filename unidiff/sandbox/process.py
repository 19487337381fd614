"""The processes of a sandbox: their limits, how one is started, read and ended. The other side is child.py."""

from __future__ import annotations

import ctypes
import functools
import io
import json
import math
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from . import folders, streams

CHILD = Path(__file__).with_name("child.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32")  # what programs need; not /etc
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
LANDLOCK_CREATE, SET_DUMPABLE = 444, 4
MEBIBYTE = 1 << 20
NOT_BUILT = "the sandbox could not be built"
SWEEP_SECONDS = 2.0
FORK_SECONDS = 30.0  # for a server to start and fork, on a machine that is busy


class SandboxError(RuntimeError):
    """The sandbox itself failed or was refused: nothing is known about the code."""


class Ending(StrEnum):
    """Why a program ended."""

    EXITED = "exited"
    SIGNAL = "signal"  # by itself, or by a limit
    TIMEOUT = "timeout"
    OUTPUT = "output"  # it printed more than it may


@dataclass(frozen=True)
class Outcome:
    """How a program ended. code: exit status, or the signal's number; None if it was stopped from outside."""

    stop: Ending
    code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """It ended by itself with status 0. A program chooses its status: this is not a verdict."""
        return self.stop is Ending.EXITED and self.code == 0


@dataclass(frozen=True)
class Limits:
    """What a sandboxed process may use, and what it may see.

    seconds:    wall clock for one run with its start (about 0.05 s on a free machine); each process may use as many
                CPU seconds, rounded up.
    memory:     MiB of address space for each process.
    disk:       MiB of /tmp, which lives in memory, and of any one file.
    processes:  processes and threads at a time.
    open_files: open files of each process.
    output:     bytes of stdout and of stderr; a program that prints more is stopped.
    paths:      folders that are readable and on `sys.path`, such as a site-packages.
    python:     the interpreter, not that of a virtual environment; the trainer's own base unless given.
    network:    "deny", or "allow" (see sandbox.py).
    """

    seconds: float = 6.0
    memory: int = 512
    disk: int = 32
    processes: int = 8
    open_files: int = 64
    output: int = 1 << 16
    paths: tuple[str, ...] = ()
    python: str = ""
    network: Literal["deny", "allow"] = "deny"

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "disk", "processes", "open_files", "output"):
            number = _number(name, getattr(self, name), float if name == "seconds" else int)
            object.__setattr__(self, name, number)
        if isinstance(self.paths, str):
            raise ValueError(f"paths is {self.paths!r}; it must be a list")
        object.__setattr__(self, "paths", tuple(map(os.fspath, self.paths)))
        for path in self.paths:
            if not os.path.isabs(path) or not os.path.isdir(path):
                raise ValueError(f"paths: {path!r} is not a folder with an absolute path")
        if self.network not in ("deny", "allow"):
            raise ValueError(f"network is {self.network!r}; choose one of deny, allow")


def _number(name: str, value: Any, kind: type[float]) -> float:
    """A positive number of a kind, also from a scalar of numpy. Raises ValueError with the name."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str | bool) or number != value or math.isinf(number):
        raise ValueError(f"{name} is {value!r}; it must be a {'whole' if kind is int else 'finite'} number")
    if number <= 0:
        raise ValueError(f"{name}={number!r}; it must be above 0")
    return number


@functools.cache
def namespaces_refused() -> str | None:
    """Why the system does not let a sandbox have namespaces; None if it does. Asked once a process."""
    with ExitStack() as stack:
        try:
            Process(Limits(), stack, "program", "", namespaces=True).finish()
        except SandboxError as error:
            return str(error)
    return None


@functools.cache
def warn_unisolated(reason: str) -> None:
    message = f"the sandbox runs with limits alone, without namespaces: {reason}"
    if ctypes.CDLL(None).syscall(LANDLOCK_CREATE, None, 0, 1) < 1:
        owner = "'nobody'" if os.geteuid() == 0 else "you"
        message += f". This kernel has no Landlock: the code can read and change all files that {owner} can"
    warnings.warn(message, stacklevel=4)


@functools.cache
def hide() -> None:
    """Closes this process's memory, descriptors and environment to others of its user, such as the sandboxed code.

    For good: it leaves no core dump, and py-spy and gdb can attach as root alone. Root's sandboxes run as nobody, and
    cannot look in anyway.
    """
    if os.geteuid() != 0:
        ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)


@functools.cache
def _prefix(python: str) -> str:
    """The folder of an interpreter's own files. Raises SandboxError if it is none."""
    if not python:
        return sys.base_prefix
    ask = [python, "-I", "-S", "-c", "import sys; print(sys.base_prefix)"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SandboxError(f"python={python!r} is not a Python interpreter: {error}") from error


@functools.cache
def _readable(prefix: str, paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """The folders that a sandbox sees, and where each is without links: the system's, Python's own and those given,
    none inside another. Those that are links come last, since most lead into the others."""
    kept: list[tuple[str, str]] = []
    places = {path: os.path.realpath(path) for path in (*SYSTEM, os.path.realpath(prefix), prefix, *paths)}
    for path, place in sorted(places.items(), key=lambda one: (one[0] != one[1], one[0])):
        inside = any(os.path.commonpath((path, other)) == other for other, _ in kept)
        if os.path.exists(path) and path != "/" and not inside:
            kept.append((path, place))
    return kept


class Server:
    """A warm interpreter that forks sandboxes, since starting Python for each would take most of its time.

    It ends with this process. The kernel ties it to the thread that starts it, so one of its own does, and waits.
    """

    def __init__(self, python: str) -> None:
        self.python, self.lock, self.started = python, threading.Lock(), threading.Event()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.said = b""
        self.socket.settimeout(FORK_SECONDS)
        self.thread = threading.Thread(target=self._work, args=(theirs,), daemon=True, name="unidiff-sandbox")
        self.thread.start()
        self.started.wait()

    def _work(self, theirs: socket.socket) -> None:
        words = [self.python, "-I", "-S", "-X", "utf8", str(CHILD), str(theirs.fileno()), str(os.getpid())]
        try:
            with theirs:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=ENVIRONMENT,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            self.said = str(error).encode()
            return
        finally:
            self.started.set()
        self.said = process.communicate()[1]

    def fork(self, job: dict[str, Any], fds: Sequence[int]) -> int:
        """Starts a launcher with a job and these descriptors (see child.py); gives a descriptor of its process. Raises
        SandboxError."""
        message = b""
        with self.lock, suppress(OSError):
            socket.send_fds(self.socket, [json.dumps(job).encode()], fds)
            message, received, _, _ = socket.recv_fds(self.socket, 1000, 1)
            if received:
                return received[0]
        if not message:  # it has ended, or hangs
            _SERVERS.pop((self.python, os.getpid()), None)
        said = (message or self.said).decode(errors="replace").strip().splitlines() or ["its server has ended"]
        raise SandboxError(f"{NOT_BUILT}: {said[-1]}")


_SERVERS: dict[tuple[str, int], Server] = {}
_STARTING = threading.Lock()


def server(python: str) -> Server:
    """This process's server for an interpreter, started when it is first needed. A forked trainer gets its own."""
    key = (python, os.getpid())
    with _STARTING:
        for other in [one for one in _SERVERS if one[1] != key[1]]:
            _SERVERS.pop(other).socket.close()
        if key not in _SERVERS or not _SERVERS[key].thread.is_alive():  # none yet, or something has killed it
            _SERVERS[key] = Server(python)
        return _SERVERS[key]


def _namespaces(limits: Limits) -> bool:
    """Whether a sandbox has namespaces. Raises SandboxError where it needs them and they are refused."""
    reason = namespaces_refused()
    if reason is None:
        return True
    if limits.network == "deny":
        raise SandboxError(
            f"{reason}. Without namespaces the network cannot be closed. Allow unprivileged user namespaces, or "
            "run the code elsewhere (tools/reward_server.py), or accept limits without isolation: network='allow'"
        )
    warn_unisolated(reason)
    hide()
    return False


class Process:
    """One sandboxed process, started at once. mode: what it does with a text (payload.py). All that it needs here is
    closed, and it is ended, when the stack is closed."""

    def __init__(
        self, limits: Limits, stack: ExitStack, mode: str, text: str, stdin: str = "", namespaces: bool | None = None
    ) -> None:
        self.limits, self.stack = limits, stack
        if namespaces is None:
            namespaces = _namespaces(limits)
        job = {
            "mode": mode, "namespaces": namespaces, "folder": None if namespaces else self._folder(),
            "network": limits.network == "allow", "readable": _readable(_prefix(limits.python), limits.paths),
            "paths": limits.paths, "memory": limits.memory * MEBIBYTE, "disk": limits.disk * MEBIBYTE,
            "processes": limits.processes, "open_files": limits.open_files, "cpu_seconds": math.ceil(limits.seconds),
        }  # fmt: skip
        own = getattr(sys, "_base_executable", None) or sys.executable  # a virtual environment's folder is not seen
        (self.status, status), (self.stdout, stdout), (self.stderr, stderr) = (self._pipe() for _ in range(3))
        given = [self._text(text), status, self._text(stdin), stdout, stderr]
        self.started = time.monotonic()
        self.process = server(limits.python or own).fork(job, [file.fileno() for file in given])
        stack.callback(os.close, self.process)
        stack.callback(self.kill)
        for file in given:
            file.close()

    def _folder(self) -> str:
        """A new name; the launcher makes the folder."""
        folder = os.path.join(tempfile.gettempdir(), f"unidiff-sandbox-{secrets.token_hex(8)}")
        self.stack.callback(folders.remove, folder)
        return folder

    def _file(self, fd: int, mode: str) -> io.FileIO:
        return self.stack.enter_context(io.FileIO(fd, mode))

    def _pipe(self) -> tuple[io.FileIO, io.FileIO]:
        ends = os.pipe()
        return self._file(ends[0], "r"), self._file(ends[1], "w")

    def _text(self, text: str) -> io.FileIO:
        """A file in memory with this text, at its start: unlike a pipe it takes any length at once."""
        file = self._file(os.memfd_create("unidiff-sandbox"), "w+")
        left = memoryview(text.encode("utf-8", "surrogatepass"))
        while left:
            left = left[file.write(left) :]
        file.seek(0)
        return file

    def finish(self) -> Outcome:
        """Reads what the process says until it ends or has to be stopped."""
        status, *printed = (file.fileno() for file in (self.status, self.stdout, self.stderr))
        limits = dict.fromkeys(printed, self.limits.output) | {status: math.inf}
        said, stop = streams.read(limits, self.started + self.limits.seconds)
        seconds = time.monotonic() - self.started
        self.kill()
        stdout, stderr = (said[fd][: self.limits.output].decode(errors="replace") for fd in printed)
        if stop is not None:
            return Outcome(Ending(stop), None, stdout, stderr, seconds)
        how, _, detail = said[status].decode(errors="replace").partition("\n")[0].partition(" ")
        if how not in ("exit", "signal"):
            raise SandboxError(f"{NOT_BUILT}: {detail or stderr[-500:].strip() or 'it ended without a word'}")
        return Outcome(Ending.EXITED if how == "exit" else Ending.SIGNAL, int(detail), stdout, stderr, seconds)

    def kill(self) -> None:
        """Ends the launcher and with it everything that it started. Does nothing if it is over."""
        ended = select.poll()
        ended.register(self.process, select.POLLIN)
        for number, milliseconds in ((signal.SIGTERM, SWEEP_SECONDS * 1000), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, number)  # the launcher ends when all others have
            if ended.poll(milliseconds):
                return
