"""tools/inspect_checkpoint.py: it says what a checkpoint is, and what is wrong with it, all of it at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("tools/inspect_checkpoint.py")


@pytest.mark.parametrize("family", ["llada", "mmada", "mmada_parallel", "mmada_parallel_a", "dimoo"])
def test_a_sound_checkpoint(
    family: str, tool: ModuleType, published: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(published(family))]) == 0
    said = capsys.readouterr().out
    assert f"family {family.removesuffix('_a')}\n" in said and "WRONG" not in said and said.count("ok ") == 4
    assert "2 layers, d_model 32" in said and "21 tensors in 1 files, torch.float32; names and shapes fit" in said
    assert "\n  attention = bidirectional\n" in said and "\n  mask = 0\n" in said


def test_the_native_model(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(ROOT / "recipes" / "base"), "--family", "native"]) == 0
    assert "family native\nok     loading" in capsys.readouterr().out


def test_all_that_is_wrong_is_said(
    tool: ModuleType, published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(published("mmada"), tmp_path / "spoiled"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "qk_gain": 2}))
    assert tool.main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert "ok     config.json" in said and "not read: qk_gain" in said
    assert "WRONG  weights: " in said and "cut off" in said
    assert "WRONG  tokenizer and ids: ModelSpec.image_offset" in said and "1 token too many" in said


def test_no_checkpoint_at_all(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path)]) == 1
    assert "it has no config.json" in capsys.readouterr().out
    assert tool.main([str(ROOT / "recipes" / "base"), "--family", "nativ"]) == 1
    assert "did you mean 'native'?" in capsys.readouterr().out
