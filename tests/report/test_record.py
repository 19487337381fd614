"""A record says what the rollout, its views and its rewards say."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff.grpo.experience import segment_views
from unidiff.report.record import record
from unidiff.report.regeneration import full_regeneration
from unidiff.rewards.reward import reward
from unidiff.rewards.table import reward_table
from unidiff.sampling.compute import Compute, Cost
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality


def records(batch, model, **options):
    return [
        record(r, v, table=batch.table, routed=batch.routed, row=i, decode_token=model.tokenizer.decode, **options)
        for i, (r, v) in enumerate(zip(batch.rollouts, batch.rows))
    ]


def pixels(png: bytes | None) -> np.ndarray:
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)))


def test_prompt_and_segments_are_those_of_a_sampled_rollout(sampled, model, task) -> None:
    with_picture = [i for i, r in enumerate(sampled.rollouts) if len(r.segments) > 1]
    assert with_picture, "no rollout of the fixture has a picture: choose another seed"
    all_records = records(sampled, model)
    for i in (0, *with_picture):
        rollout, views, made = sampled.rollouts[i], sampled.rows[i], all_records[i]
        assert [s.text for s in made.prompt] == [task.example("dev", 0).prompt[0], None]
        assert np.array_equal(pixels(made.prompt[1].picture), np.asarray(views[0].prompt[1]))
        assert made.stop == rollout.stop.name.lower() and made.stop_reason == rollout.stop.value
        assert made.compute == {phase: cost.to_dict() for phase, cost in rollout.compute.items()}
        for segment, view, shown in zip(rollout.segments, views, made.response):
            assert shown.tokens == segment.tokens.tolist() and shown.step == segment.step.tolist()
            assert np.allclose(shown.probability, segment.probability.numpy(), atol=1e-4)
            assert shown.text == view.text
            if segment.modality is Modality.IMAGE:
                assert np.array_equal(pixels(shown.picture), view.pixels) and shown.grid == segment.grid
                assert shown.edited == segment.edited.tolist() and shown.denoised == 8 and shown.kept == 56
            else:
                assert shown.words == [model.tokenizer.decode(t) for t in shown.tokens]


def test_changed_tokens_are_those_that_differ_from_the_image_before(demonstrated, model) -> None:
    for made, rollout in zip(records(demonstrated, model), demonstrated.rollouts):
        before = rollout.sequence.prompt.last_image().tokens
        for segment, shown in zip(rollout.segments, made.response):
            if segment.modality is Modality.TEXT:
                assert shown.changed is None
                continue
            assert shown.changed == (segment.tokens != before).tolist()
            assert not any(c and not e for c, e in zip(shown.changed, shown.edited))
            before = segment.tokens


def test_rewards_and_advantage_are_the_tables(demonstrated, model) -> None:
    table, routed = demonstrated.table, demonstrated.routed
    for i, made in enumerate(records(demonstrated, model)):
        for s, shown in enumerate(made.response):
            for said in shown.rewards:
                f = table.names.index(said.name)
                assert table.on[f] == shown.modality and said.weight == table.weights[f]
                value = float(table.values_BSF[i, s, f])
                assert said.value == value if said.value is not None else math.isnan(value) and said.why
            valid = bool(routed.valid_BS[i, s])
            assert shown.advantage == (float(routed.advantage_BS[i, s]) if valid else None)


def test_success_follows_figures_then_rewards(demonstrated, model) -> None:
    successes = {r.success for r in records(demonstrated, model)}
    assert successes == {True, False}
    rollout, views = demonstrated.rollouts[0], demonstrated.rows[0]
    assert record(rollout, views).success is None
    assert record(rollout, views, figures={"success": 1.0, "image_exact": math.nan}).figures == {"success": 1.0}
    assert record(rollout, views, figures={"success": 0.0}).success is False


def test_lost_and_whole_response_rewards_say_why(demonstrated) -> None:
    @reward(on="image")
    def broken(segments):
        raise RuntimeError("no <b>network</b>")

    @reward(on="sequence", weight=2.0)
    def length(segments):
        return [float(len(s.segments)) for s in segments]

    rows = demonstrated.rows[:2]
    table = reward_table([broken, length], rows)
    made = record(demonstrated.rollouts[1], rows[1], table=table, row=1)
    assert [(r.name, r.value, r.weight) for r in made.rewards] == [("length", float(len(rows[1])), 2.0)]
    picture = next(s for s in made.response if s.modality == "image")
    assert picture.rewards[0].value is None and "no <b>network</b>" in picture.rewards[0].why


def test_saved_compute_is_against_regenerating_every_picture(demonstrated) -> None:
    """Finished pictures are written into the cache either way."""
    rollout, views = demonstrated.rollouts[0], demonstrated.rows[0]
    written = Compute(select=Cost(1, 10), write_image=Cost(1, 66), write_text=Cost(1, 99))
    made = record(replace(rollout, compute=written), views, full=Compute(image=Cost(8, 512), write_image=Cost(1, 66)))
    pictures = sum(s.modality is Modality.IMAGE for s in rollout.segments)
    assert made.image_tokens == 64 * pictures and made.kept_tokens == 56 * pictures
    assert made.saved == pytest.approx(1 - 76 / 578)
    assert record(rollout, views).saved is None


def test_a_full_rollout_saves_nothing(model, task) -> None:
    sampler = InterleavedSampler(model, SamplerConfig(edit="full", image_steps=3, max_rounds=1))
    example = task.example("dev", 0)
    rollouts = sampler.sample([model.encode(example.prompt)], range(8))
    drawn = [i for i, r in enumerate(rollouts) if len(r.segments) > 1]
    assert drawn
    views = segment_views(model, rollouts, [example] * 8)
    for i in range(8):
        made = record(rollouts[i], views[i], full=full_regeneration(model, rollouts[i]))
        assert made.saved == (pytest.approx(0) if i in drawn else None)


def test_records_survive_pickle_and_json(demonstrated, model) -> None:
    made = records(demonstrated, model, title="π")[0]
    assert pickle.loads(pickle.dumps(made)) == made
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert data["segments"][1]["picture"].startswith("data:image/png;base64,")
    assert data["title"] == "π" and data["settings"]["edit"] == "region"


def test_errors_name_the_argument(demonstrated) -> None:
    rollout, views = demonstrated.rollouts[0], demonstrated.rows[0]
    with pytest.raises(ValueError, match="views: the rollout has"):
        record(rollout, views[:-1])
    with pytest.raises(ValueError, match="row: say which of the 16 rows"):
        record(rollout, views, table=demonstrated.table)
    with pytest.raises(ValueError, match="row: expected 0 to 15, got 16"):
        record(rollout, views, table=demonstrated.table, row=16)


def test_a_rollout_without_step_maps_still_makes_a_record(demonstrated) -> None:
    rollout, views = demonstrated.rollouts[0], demonstrated.rows[0]
    bare = replace(rollout, sequence=type(rollout.sequence)(replace(s, step=None) for s in rollout.sequence))
    assert all(s.step is None for s in record(bare, views).response)
    assert record(replace(rollout, stop=Stop.NO_END), views).stop == "no_end"


def test_recording_leaves_the_random_state_alone(demonstrated, model) -> None:
    before = torch.get_rng_state()
    records(demonstrated, model)
    assert torch.equal(before, torch.get_rng_state())
