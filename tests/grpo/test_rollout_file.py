"""Rollout files: what is written is read back bit by bit, and files that cannot be read say why."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unidiff.grpo.rollout_file import FORMAT, RolloutBatch, load_rollouts, save_rollouts
from unidiff.report.gallery import records
from unidiff.rewards.reward import Cause, reward
from unidiff.rewards.router import RewardRouter


@reward(on="text")
def moody(segments, **columns):
    """Loses some values."""
    return [float(len(s.tokens)) if s.index else None for s in segments]


@pytest.fixture
def trainer(make_trainer, rewards):
    return make_trainer([*rewards, moody], log_rollouts_every=2, max_steps=3)


@pytest.fixture
def batch(trainer) -> RolloutBatch:
    _, experience = trainer.step(0)
    return trainer.batch(0, experience)


@pytest.fixture
def path(tmp_path: Path, batch: RolloutBatch) -> Path:
    save_rollouts(tmp_path / "rollouts" / "step-000001.safetensors", batch)
    return tmp_path / "rollouts" / "step-000001.safetensors"


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_what_is_written_is_read_back(batch, path) -> None:
    read = load_rollouts(path)
    assert read.titles == batch.titles and read.step == 1 and read.router == batch.router and read.fits == batch.fits
    assert torch.equal(read.groups_B, batch.groups_B)
    assert read.config == json.loads(json.dumps(batch.config))
    for a, b in zip(batch.rollouts, read.rollouts, strict=True):
        assert (a.stop, a.key, a.settings, a.compute) == (b.stop, b.key, b.settings, b.compute)
        for x, y in zip(a.sequence, b.sequence, strict=True):
            assert (x.modality, x.prompt, x.grid) == (y.modality, y.prompt, y.grid)
            for name in ("tokens", "edited", "step", "probability"):
                assert same(getattr(x, name), getattr(y, name)), name
            assert same(x.trace if x.trace is None else x.trace.half().float(), y.trace)
    for name in ("values_BSF", "sequence_BF", "modality_BS"):
        assert same(getattr(batch.table, name), getattr(read.table, name))
    for name in ("names", "weights", "on", "credit", "missing", "scale", "logged", "extra"):
        assert getattr(batch.table, name) == getattr(read.table, name)
    assert batch.table is not None and any(loss.cause is Cause.NONE for loss in batch.table.missing.values())
    assert torch.equal(batch.routed.advantage_BS, read.routed.advantage_BS)
    for name, values in batch.figures.items():
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, read.figures[name]))


def test_a_file_can_be_read_by_whom_others_can_be(path) -> None:
    (path.parent / "other").write_text("")
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_advantages_can_be_routed_again_from_a_file(batch, path) -> None:
    read = load_rollouts(path)
    assert read.table is not None and read.routed is not None
    again = RewardRouter(**read.router).route(read.table, read.groups_B)
    assert torch.equal(again.advantage_BS, read.routed.advantage_BS)


def test_a_file_explains_its_advantages(batch, path) -> None:
    """Long after the run: what each reward said of a segment, and how its tokens came to their advantage."""
    read = load_rollouts(path)
    said = 0
    for row, rollout in enumerate(batch.rollouts):
        for segment in range(len(rollout.segments)):
            told = read.table.explain(row, segment, read.routed)
            assert told == batch.table.explain(row, segment, batch.routed)
            said += "compared in group" in told
    assert said and read.routed.metrics == batch.routed.metrics


def test_rollouts_without_rewards(batch, tmp_path) -> None:
    bare = replace(batch, table=None, routed=None, figures={}, router={})
    save_rollouts(tmp_path / "bare.safetensors", bare)
    read = load_rollouts(tmp_path / "bare.safetensors")
    assert read.table is None and read.routed is None and len(read) == len(batch)


def test_the_trainer_writes_the_first_step_and_every_nth(trainer) -> None:
    trainer.train()
    files = sorted(p.name for p in (trainer.folder.path / "rollouts").iterdir())
    assert files == ["step-000001.safetensors", "step-000002.safetensors"]
    read = load_rollouts(trainer.folder.rollouts(2))
    assert read.step == 2 and read.config["num_generations"] == 3 and len(read) == 6
    assert read.groups_B.tolist() == [0, 0, 0, 1, 1, 1]
    read.check(trainer.model)


def test_only_steps_that_are_saved_are_traced_and_tracing_changes_no_token(make_trainer) -> None:
    traced = [make_trainer(log_rollouts_every=every).step(1)[1].rollouts for every in (2, 3)]
    for saved, passed in zip(*traced, strict=True):
        assert all(s.trace is not None and len(s.trace) for s in saved.segments if bool((s.step >= 0).any()))
        assert all(s.trace is None for s in passed.segments)
        assert [s.tokens.tolist() for s in saved.segments] == [s.tokens.tolist() for s in passed.segments]


def test_no_files_where_none_are_wanted(make_trainer) -> None:
    trainer = make_trainer(log_rollouts_every=0, max_steps=1)
    trainer.train()
    assert not (trainer.folder.path / "rollouts").exists()


# ---------------------------------------------------------------- files that cannot be read


def rewritten(path: Path, *, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    """The file again with other metadata or tensors."""
    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        known = file.metadata()
    save_file({**kept, **tensors}, path, {**known, **(metadata or {})})
    return path


def test_a_newer_version(path) -> None:
    with pytest.raises(ValueError, match="has version 2, this unidiff reads up to 1: update unidiff"):
        load_rollouts(rewritten(path, metadata={"version": "2"}))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_off_file(path, share) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is cut off, or no safetensors file"):
        load_rollouts(path)


def test_a_missing_file_and_one_of_another_kind(path, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rollouts(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds no rollouts, it is of format 'weights'"):
        load_rollouts(rewritten(path, metadata={"format": "weights"}))
    assert FORMAT == "unidiff.rollouts"


def test_a_damaged_file(path) -> None:
    with pytest.raises(ValueError, match=r"is damaged .*tokens has 3 values"):
        load_rollouts(rewritten(path, tokens=torch.zeros(3, dtype=torch.int32)))
    with pytest.raises(ValueError, match="is damaged"):
        load_rollouts(rewritten(path, metadata={"header": "{}"}))


def test_a_checkpoint_that_does_not_fit(batch, model) -> None:
    batch.check(model)
    fits = {**batch.fits, "spec": {**batch.fits["spec"], "codebook_size": 8192}}
    with pytest.raises(ValueError, match="codebook_size is 128, the rollouts have 8192"):
        replace(batch, fits=fits).check(model)
    with pytest.raises(ValueError, match="its image tokenizer is another one"):
        records(model, replace(batch, fits={**batch.fits, "image": "0" * 64}))


def test_settings_of_a_sampler_are_data(batch, path) -> None:
    assert asdict(load_rollouts(path).rollouts[0].settings) == asdict(batch.rollouts[0].settings)
