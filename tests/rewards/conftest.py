"""Fixtures: responses made by hand; the walls of the sandbox, and an ordinary user who builds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff.rewards import sandbox
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.sequence import Modality

Rows = list[tuple[SegmentView, ...]]


def _text(content: str) -> SegmentView:
    return SegmentView(modality=Modality.TEXT, tokens=torch.arange(len(content)), text=content)


def _picture(gray: int) -> SegmentView:
    pixels, edited = np.full((4, 6, 3), gray, dtype=np.uint8), np.zeros((2, 3), bool)
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=pixels, edited=edited)


@pytest.fixture
def responses() -> Callable[..., Rows]:
    """responses(count) -> rows of text, image, text, with an `answer` and a list among their columns."""

    def make(count: int = 3) -> Rows:
        board = {"cells": [1, 2, 3]}  # one object of all rows, as the G rollouts of a prompt have it
        prompt = ["q", Image.new("RGB", (6, 4), (9, 9, 9))]
        return [
            link_row(
                [_text(f"a{i}"), _picture(i), _text(f"b{i}")],
                prompt=prompt,
                task=board,
                columns={"answer": i, "board": board},
            )
            for i in range(count)
        ]

    return make


# --- the sandbox ------------------------------------------------------------------------------------------------------

# One that also nobody may read, if root runs the tests.
PYTHON = shutil.which("python3", path="/usr/bin") or ""


@pytest.fixture
def namespaces() -> None:
    """Skips the test where the system refuses namespaces."""
    if refused := sandbox.namespaces_refused():
        pytest.skip(f"the system refuses namespaces: {refused}")


@pytest.fixture(params=["namespaces", "limits"])
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs a test behind each kind of wall; gives the sandbox's options for it."""
    if request.param == "namespaces":
        request.getfixturevalue("namespaces")
        return {}
    monkeypatch.setattr(sandbox, "namespaces_refused", lambda: "switched off by the test")
    monkeypatch.setattr(sandbox, "_unisolated", lambda reason: None)
    walls = {"network": "allow", "python": PYTHON}
    try:
        sandbox.Sandbox(**walls).run("")  # type: ignore[arg-type]
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    return walls


@pytest.fixture(scope="session")
def as_nobody() -> Callable[[str], str]:
    """as_nobody(script) -> what a script prints that an ordinary user runs, with the sandbox alone to import, as S."""

    def run(script: str) -> str:
        if not PYTHON or subprocess.run([PYTHON, "-c", "from enum import StrEnum"]).returncode:
            pytest.skip("needs a Python from 3.11 up that everyone may read")
        folder = tempfile.mkdtemp(prefix="sandbox-of-nobody-")
        try:
            os.chmod(folder, 0o755)
            for source in Path(sandbox.__file__).parent.glob("sandbox*.py"):
                shutil.copy(source, folder)
            start = f"import sys\nsys.path.insert(0, {folder!r})\nimport sandbox as S\n"
            user: Any = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
            words = [PYTHON, "-W", "ignore", "-c", start + script]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, **user)
        finally:
            shutil.rmtree(folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
