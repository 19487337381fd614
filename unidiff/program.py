"""How the programs of this repository begin and end."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Mapping
from typing import Any

from unidiff.config import parse


def run_program(main: Callable[[], object]) -> None:
    """Runs a program; an int that it returns is its exit status. A reader of its output who has gone, as in
    `--help | head`, ends it without a traceback."""
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone():
            raise  # another pipe, which is the program's own affair
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        raise SystemExit(1) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def run_command(commands: Mapping[str, Callable[[Any], None]], config: type, description: str) -> None:
    """Runs the command that the first word of the command line names, with the settings behind it."""
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
