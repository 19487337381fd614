"""The package's own names: the same as ever, and imported when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import unidiff


def loaded(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert not loaded("import unidiff; dir(unidiff)") & {"torch", "numpy", "transformers", "PIL", "yaml", "accelerate"}


@pytest.mark.slow
def test_a_model_waits_for_no_trainer() -> None:
    heavy = {
        "accelerate",
        "peft",
        "transformers",
        "torchvision",
        "gymnasium",
        "rich",
        "matplotlib",
        "jinja2",
        "diffusers",
    }
    found = loaded("from unidiff import UnifiedModel, InterleavedSampler, SamplerConfig")
    assert "torch" in found and not found & heavy


def test_every_name_is_there() -> None:
    assert set(unidiff.__all__) <= set(dir(unidiff))
    for name in unidiff.__all__:
        assert getattr(unidiff, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'unidiff' has no attribute 'GRPOTrainr'"):
        unidiff.GRPOTrainr  # noqa: B018  # pyright: ignore
