"""Ends a process with the one that started it, however that one ends. Standard library alone.

The kernel signals a process whose parent dies, but only if the process has asked for it; a parent that died before is
found by its id. So the process asks first and looks then, and there is no moment between the two.
"""

import ctypes
import os
import signal
import sys

SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def tie(parent: int, number: int = signal.SIGKILL) -> None:
    """Lets this process get a signal when the thread that started it ends, or now if `parent`, its process, is gone."""
    if sys.platform == "linux":
        LIBC.prctl(SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def command(*words: str) -> list[str]:
    """Words that start a command which ends with this process. The tie outlasts exec."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *words]


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
