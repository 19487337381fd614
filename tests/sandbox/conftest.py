"""Fixtures: the walls of the sandbox, and an ordinary user who builds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unidiff.sandbox import Sandbox, SandboxError, process

# One that also nobody may read, if root runs the tests.
PYTHON = shutil.which("python3", path="/usr/bin") or ""


@pytest.fixture(params=["namespaces", "limits"])
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs a test behind each kind of wall; gives the sandbox's options for it."""
    if request.param == "namespaces":
        request.getfixturevalue("namespaces")
        return {}
    monkeypatch.setattr(process, "namespaces_refused", lambda: "switched off by the test")
    monkeypatch.setattr(process, "warn_unisolated", lambda reason: None)
    walls = {"network": "allow", "python": PYTHON}
    try:
        Sandbox(**walls).run("")  # type: ignore[arg-type]
    except SandboxError as error:
        pytest.skip(str(error))
    return walls


@pytest.fixture(scope="session")
def as_nobody() -> Callable[..., str]:
    """as_nobody(script) -> what a script prints that an ordinary user runs, with the sandbox alone to import, as S.

    landlock: the version that the kernel says it has (0: none), instead of its own.
    """

    def run(script: str, landlock: int | None = None) -> str:
        if not PYTHON or subprocess.run([PYTHON, "-c", "from enum import StrEnum"]).returncode:
            pytest.skip("needs a Python from 3.11 up that everyone may read")
        folder = tempfile.mkdtemp(prefix="sandbox-of-nobody-")
        try:
            os.chmod(folder, 0o755)
            shutil.copytree(Path(process.__file__).parent, f"{folder}/sandbox")
            if landlock is not None:
                ask, inside = "libc.syscall(LANDLOCK_CREATE, None, 0, 1)", Path(f"{folder}/sandbox/child.py")
                assert inside.read_text().count(ask) == 1
                inside.write_text(inside.read_text().replace(ask, str(landlock)))
            start = f"import sys\nsys.path.insert(0, {folder!r})\nimport sandbox as S\n"
            user: Any = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
            words = [PYTHON, "-W", "ignore", "-c", start + script]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, **user)
        finally:
            shutil.rmtree(folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
