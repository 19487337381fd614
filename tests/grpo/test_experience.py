"""Experience: what a rollout batch becomes for rewards and for the update."""

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff import noise
from unidiff.attention import before_last_sampled
from unidiff.estimators import Draw, View
from unidiff.grpo.experience import Experience, segment_views, spread
from unidiff.sampling.compute import Compute
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality, Segment


@pytest.fixture(scope="module")
def examples(task):
    return [task.example("train", i) for i in range(4) for _ in range(2)]


@pytest.fixture(scope="module")
def rollouts(model, task, examples):
    sampler = InterleavedSampler(model, SamplerConfig(edit="random", edit_share=0.3, max_rounds=2))
    prompts = [model.encode(e.prompt) for e in examples[::2]]
    return sampler.sample(prompts, [noise.key(0, 1, i, g) for i in range(4) for g in range(2)])


@pytest.fixture(scope="module")
def canvas(model, rollouts):
    return model.render([r.sequence for r in rollouts])


def experience_of(canvas, rollouts, masks, advantage_BL, trained_BL):
    draws = [Draw([View(m)], m.float(), (1, 1)) for m in masks]
    return Experience(rollouts, [], [], None, None, canvas, draws, advantage_BL, trained_BL)


def test_views_hold_what_was_sampled(model, rollouts, examples):
    rows = segment_views(model, rollouts, examples)
    assert len(rows) == len(rollouts) and {len(r) for r in rows} > {1}
    for row, rollout, example in zip(rows, rollouts, examples):
        assert [v.modality for v in row] == [s.modality for s in rollout.segments]
        for i, (view, segment) in enumerate(zip(row, rollout.segments)):
            assert view.index == i and view.last == (i == len(row) - 1) and view.before == row[:i]
            assert view.task is example and view.prompt == example.prompt
            assert view.columns["board"] is example.board and torch.equal(view.tokens, segment.tokens)
            if view.modality is Modality.TEXT:
                assert view.text == model.decode_text(segment.tokens) and view.pixels is None
            else:
                alone = model.decode([segment])[0]  # each picture as if it were decoded on its own
                assert np.abs(view.pixels.astype(int) - np.asarray(alone).astype(int)).max() <= 1
                assert np.array_equal(view.edited, segment.edited.reshape(8, 8)) and view.text is None


def test_only_an_answered_response_ends_with_an_answer(model, rollouts, examples):
    rows = segment_views(model, rollouts, examples)
    assert {r.stop for r in rollouts} == set(Stop) - {Stop.DRAWN}  # every reason that rounds have
    for row, rollout in zip(rows, rollouts):
        assert row[-1].ended == (rollout.stop is Stop.ANSWERED)
        assert all(v.ended for v in row[:-1])


def test_pictures_of_several_grids(model):
    def picture(rows, columns):
        tokens = torch.arange(rows * columns) % model.spec.codebook_size + model.spec.image_offset
        return Segment(Modality.IMAGE, tokens, grid=(rows, columns))

    words = Segment(Modality.TEXT, torch.tensor([model.spec.image_next]))
    sequences = [(words, picture(8, 8), words, picture(4, 8)), (words, picture(4, 8))]
    mixed = [Rollout(model.encode(["go"]) + s, Stop.MAX_ROUNDS, Compute(), 0, SamplerConfig()) for s in sequences]
    example = type("Example", (), {"prompt": ["go"], "columns": {}})()
    rows = segment_views(model, mixed, [example, example])
    assert [[v.pixels.shape for v in row if v.pixels is not None] for row in rows] == [
        [(64, 64, 3), (32, 64, 3)],
        [(32, 64, 3)],
    ]
    assert np.array_equal(rows[0][3].pixels, rows[1][1].pixels)


def test_spread_gives_each_token_the_value_of_its_segment(canvas, rollouts):
    longest = max(len(r.segments) for r in rollouts)
    values = torch.arange(1.0, 1 + len(rollouts) * longest).reshape(len(rollouts), longest)
    spread_BL = spread(values, canvas, rollouts)
    for b, rollout in enumerate(rollouts):
        given = len(rollout.sequence.prompt)
        for column in range(canvas.shape[1]):
            segment = int(canvas.segment[b, column])
            expected = float(values[b, segment - given]) if segment >= given else 0.0
            assert float(spread_BL[b, column]) == expected


def test_weight_is_for_masked_tokens_of_trained_segments(canvas, rollouts):
    mask = canvas.sampled.clone()
    mask[:, ::3] = False
    trained = canvas.segment % 2 == 0
    experience = experience_of(canvas, rollouts, [canvas.sampled, mask], torch.zeros(canvas.shape), trained)
    assert torch.equal(experience.weight_BL(1), (mask & trained).float())
    assert torch.equal(experience.weight_BL(0), (canvas.sampled & trained).float())


@each("size", [1, 3, 8, 100])
def test_micro_batches_hold_every_row_once_by_length(canvas, rollouts, size):
    experience = experience_of(canvas, rollouts, [canvas.sampled], torch.zeros(canvas.shape), canvas.sampled)
    batches = experience.micro_batches(size, "block_causal")
    order = torch.cat([b.rows for b in batches])
    assert sorted(order.tolist()) == list(range(8)) and all(len(b.rows) <= size for b in batches)
    length = (before_last_sampled(canvas).valid.sum(1) + canvas.noisy.valid.sum(1))[order]  # what a pass runs of it
    assert length.tolist() == sorted(length.tolist())


def test_micro_batches_of_rows_with_an_advantage(canvas, rollouts):
    advantage = torch.zeros(canvas.shape)
    advantage[[1, 5, 6], 3] = -0.5
    experience = experience_of(canvas, rollouts, [canvas.sampled], advantage, canvas.sampled)
    useful = experience.micro_batches(2, "block_causal", leave_out="rows")
    assert sorted(torch.cat([b.rows for b in useful]).tolist()) == [1, 5, 6]
    assert [len(b.rows) for b in useful] == [2, 1]
    experience.advantage_BL = torch.zeros(canvas.shape)
    none = experience.micro_batches(2, "block_causal", leave_out="rows")
    assert [len(b.rows) for b in none] == [1]  # every process runs a backward pass
