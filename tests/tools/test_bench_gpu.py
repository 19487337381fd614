"""tools/bench_gpu.py on the smallest shape: each part runs, and what must agree does."""

from __future__ import annotations

import json

import pytest
import torch

AGREE = {"bfloat16": 0.02, "float32": 1e-5, "gradients": 1e-5}  # largest gap, by how the row's name begins


@pytest.fixture
def bench(program, tmp_path, monkeypatch):
    """Runs the tool on the tiny shape: what it writes."""
    tool = program("tools/bench_gpu.py")

    def run(*words: str) -> dict:
        file = tmp_path / "gpu.json"
        monkeypatch.setattr("sys.argv", ["bench_gpu.py", "--size", "tiny", "--output", str(file), *words])
        tool.main()
        return json.loads(file.read_text())

    return run


@pytest.mark.slow  # torch.compile builds kernels
def test_what_must_agree_does(bench):
    rows = bench("--sections", "check")["check"]
    assert len(rows) >= 11
    for row in rows:
        kind = row["what"].replace(",", "").split()[0]
        assert 0 <= row["largest"] <= AGREE[kind], row


@pytest.mark.slow
def test_every_rollout_is_measured(bench):
    found = {row["what"]: row for row in bench("--sections", "rollout", "--rows", "2")["rollout"]}
    assert found["edit, an eighth, none"]["passes"] < found["edit, whole, none"]["passes"]
    for kind in ("text", "picture", "edit, an eighth"):
        cheaper = [found[f"{kind}, {cache}"]["times cheaper"] for cache in ("none", "prefix", "dual", "delayed")]
        assert cheaper == sorted(cheaper) and cheaper[0] >= 1 and found[f"{kind}, none"]["same tokens"] == 1
    assert all(row["seconds"] > 0 and row["TFLOP/s"] > 0 for row in found.values())


@pytest.mark.slow
def test_scoring_and_updates_are_measured(bench):
    with torch.compiler.set_stance("force_eager"):  # what is compiled is tested above
        found = bench("--sections", "score,update", "--rows", "2")
    for part in ("score", "update"):
        texts, rounds = (next(r for r in found[part] if r["what"] == f"{n}, eager") for n in ("texts", "rounds"))
        assert texts["tokens"] == 2 * (8 + 16)
        assert rounds["tokens"] > 3 * (8 + 2 * (6 + 18) + 6)  # a row for every segment
    assert found["update"][0]["planned GB"] > 0


def test_an_unknown_part_is_refused(bench):
    with pytest.raises(SystemExit, match="sections has \\['speed'\\]"):
        bench("--sections", "speed")


def test_checkpointing_runs_a_layer_twice(program):
    tool = program("tools/bench_gpu.py")
    bench = tool.Bench(2, 0, tool.SHAPES["tiny"], torch.device("cpu"), torch.float32)
    canvas, calls = bench.texts(2), []
    bench.model.body.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for again in (False, True):
        calls.clear()
        tool.gradients(bench, canvas, again)
        counts.append(len(calls))
    assert counts == [1, 2]
