"""Start and end of this repository's programs.

If a program ends with an error, `accelerate launch` and `torchrun` print their own traceback below its error message.
So the message is printed again after the launcher has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from unidiff.command_line import parse

_launcher: psutil.Process | None = None  # looked up at the start, because it may end earlier
_WAITED = 60  # maximum seconds to wait for the launcher's end
_AFTER = (
    "import select, sys\n"
    f"if select.select([int(sys.argv[1])], [], [], {_WAITED})[0]: print(sys.argv[2], file=sys.stderr)"
)


def run_program(main: Callable[[], object]) -> None:
    """Runs a program; an int that it returns is its exit status. Its error message is the last line on the screen, also
    under a launcher. If the reader of its output closes the pipe (`--help | head`), it ends without a traceback."""
    try:
        try:
            with _last_line():
                status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone():
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        raise SystemExit(1) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def run_command(commands: Mapping[str, Callable[[Any], None]], config: type, description: str) -> None:
    """Runs the command named by the first word of the command line, with the settings that follow."""
    words = sys.argv[1:] or ["--help"]
    name = "" if words[0].startswith("-") else words.pop(0)
    settings = parse(config, words, description)
    if name not in commands:
        raise SystemExit(f"error: {name!r} is not a command; give one of {', '.join(commands)}, then its settings")
    commands[name](settings)


def _reader_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def command() -> str:
    """The command line that started this program, up to the script. Call it before the launcher can end."""
    for process in (psutil.Process().parent(), psutil.Process()):
        words = _words(process)
        if sys.argv[0] in words:
            words = words[: words.index(sys.argv[0]) + 1]
            if len(words) > 2 and Path(words[1]).name in ("accelerate", "torchrun"):  # a Python script
                words = [Path(words[1]).name, *words[2:]]
            return shlex.join(words)
    return shlex.join([sys.executable, sys.argv[0]])


@contextlib.contextmanager
def _last_line() -> Iterator[None]:
    """Wraps a program: warnings become single lines, and a SystemExit's message is the last line on the screen."""
    global _launcher
    _launcher = _started_by()
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            repeat(end.code)
        raise
    finally:
        warnings.formatwarning = shown


def repeat(message: str) -> None:
    """Prints a message on standard error again after the launcher, if any, has ended. Call it just before this process
    ends."""
    if _launcher is None:
        return
    with contextlib.suppress(OSError, AttributeError):  # another process of the launcher does it, or this is not Linux
        first = socket.socket(socket.AF_UNIX)
        first.bind(f"\0unidiff.launcher.{_launcher.pid}")
        try:
            ended = os.pidfd_open(_launcher.pid)
        except ProcessLookupError:  # the launcher has ended already
            print(message, file=sys.stderr, flush=True)
            return
        kept = [ended, first.fileno()]
        code = [sys.executable, "-I", "-S", "-c", _AFTER, str(kept[0]), message]
        subprocess.Popen(code, pass_fds=kept, start_new_session=True)


def _started_by() -> psutil.Process | None:
    """The launcher of this program, if there is one."""
    parent = psutil.Process().parent()
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return parent if launched and sys.argv[0] in _words(parent) else None


def _words(process: psutil.Process | None) -> list[str]:
    try:
        return process.cmdline() if process else []
    except psutil.Error:
        return []
