"""UnifiedModel: scores against a plain reference and for any batch; encoding, decoding, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import unidiff.head
from tests.tables import each
from unidiff import noise
from unidiff.attention import additive
from unidiff.canvas import Canvas, Tokens
from unidiff.estimators import View, draw_views, make
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.fill import fill
from unidiff.sampling.sampler import InterleavedSampler, rollout
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec
from unidiff.tasks import FrozenLake

RandomRows = Callable[..., list[Interleaved]]
ESTIMATORS = ["one_step", "random", "fading_out", "image_random"]


@pytest.fixture(scope="module")
def rows(model: UnifiedModel, random_rows: RandomRows) -> list[Interleaved]:
    return [r for r in random_rows(model.spec, 24, 0) if r.response][:8]


def keys(n: int) -> Tensor:
    return torch.tensor([noise.key(5, i) for i in range(n)])


def views(canvas: Canvas, name: str, iterations: int = 2) -> list[View]:
    estimator = make(name)
    draws = draw_views(canvas, estimator, estimator, iterations, keys(canvas.shape[0]))
    return [view for draw in draws for view in draw.views]


# ---------------------------------------------------------------- score


def plain_score(
    model: UnifiedModel, canvas: Canvas, mask: Tensor, temperature: tuple[float, float], hide: Tensor | None = None
) -> Tensor:
    """Each sampled segment by itself: the sequence cut before it and the noisy segment alone, one row at a time."""
    out = torch.zeros(canvas.shape, dtype=torch.float64)
    for b in range(canvas.shape[0]):
        for s in range(int(canvas.segment[b].max()) + 1):
            columns = (canvas.segment[b] == s).nonzero()[:, 0]
            if not canvas.sampled[b, columns].any():
                continue
            before, ids = (canvas.segment[b] >= 0) & (canvas.segment[b] < s), canvas.ids[b]
            clean = canvas.clean.rows(torch.tensor([b]))
            if hide is not None:
                clean = clean.with_ids(ids.masked_fill(hide[b], model.spec.mask)[None])
            noisy, hidden_by = noisy_segment(model.spec, canvas, mask[b], b, columns)
            both = Tokens.cat([clean.columns(before), noisy])
            seen = both.segment[:, None, :] <= both.segment[:, :, None]
            with torch.no_grad():
                states = model.hidden(both, additive(seen, model.dtype))[0, int(before.sum()) :]
            modality = Modality(int(canvas.modality[b, columns[0]]))
            low, high = model.spec.range_of(modality)
            logits = states.double() @ model.backbone.lm_head.weight[low:high].double().T
            logp = (logits / temperature[modality]).log_softmax(-1)
            for at, column in enumerate(hidden_by):
                if column is not None and mask[b, column]:
                    out[b, column] = logp[at, ids[column] - low]
    return out


def noisy_segment(
    spec: ModelSpec, canvas: Canvas, mask: Tensor, b: int, columns: Tensor
) -> tuple[Tokens, list[int | None]]:
    """A sampled segment as a sampler runs it, [1, N], and the clean column of each of its tokens, or None."""
    sampled = [c for c in columns.tolist() if canvas.sampled[b, c]]
    tokens = canvas.clean.rows(torch.tensor([b])).columns(torch.tensor(sampled))
    tokens = tokens.with_ids(tokens.ids.masked_fill(mask[sampled][None], spec.mask))
    if tokens.modality[0, 0] == Modality.IMAGE:
        return tokens, sampled
    rest = spec.text_length - len(sampled)
    tail = Tokens(*(torch.full((1, rest), -1) for _ in range(7)))
    tail.ids, tail.valid = torch.full((1, rest), spec.mask), torch.ones(1, rest, dtype=torch.bool)
    tail.segment, tail.modality = tokens.segment[:, :1].expand(1, rest), tokens.modality[:, :1].expand(1, rest)
    tail.offset = len(sampled) + torch.arange(rest)[None]
    tail.position = tokens.position[:, :1] + tail.offset
    return Tokens.cat([tokens, tail]), [*sampled, *[None] * rest]


@pytest.mark.parametrize("temperature", [(1.0, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize("name", ["one_step", "random"])
@pytest.mark.parametrize("which", ["exact_model", "plain_model"])
def test_score_is_the_plain_reference(
    which: str, name: str, temperature: tuple[float, float], rows: list[Interleaved], request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(which)).double()
    canvas = model.render(rows)
    for view in views(canvas, name)[:1]:
        found = model.score(canvas, view.mask, view.hide, temperature).detach()
        expected = plain_score(model, canvas, view.mask, temperature, view.hide)
        assert found.dtype == torch.float32 and (found[~view.mask] == 0).all()
        assert (found[view.mask] < 0).all() and view.mask.sum() > 50
        assert (found - expected).abs().max() < 5e-6  # the head is float32 here
        for modality in Modality:
            assert expected[view.mask & (canvas.modality == modality)].std() > 0.5  # far from uniform


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_do_not_depend_on_the_batch(name: str, exact_model: UnifiedModel, rows: list[Interleaved]) -> None:
    """Invariants 1 and 4: the ratio of an unchanged policy is 1 for any micro-batch, order and padding."""
    model, canvas = exact_model, exact_model.render(rows)
    for view in views(canvas, name):
        whole = model.score(canvas, view.mask, view.hide).detach()
        for index in [[0], [7], [6, 2], [3, 1, 4, 0, 7], [5, 4, 3, 2, 1, 0, 6, 7], [2, 2]]:
            part = torch.tensor(index)
            some = view.rows(part)
            found = model.score(canvas.rows(part), some.mask, some.hide).detach()
            assert ((found - whole[part]).exp() - 1).abs().max() < 2e-6
        shuffled = torch.tensor([4, 7, 1, 0, 2, 6, 3, 5])
        again = model.render([rows[i] for i in shuffled])
        redrawn = draw_views(again, make(name), make(name), 2, keys(8)[shuffled])[0].views[0]
        found = model.score(again, redrawn.mask, redrawn.hide).detach()
        first = views(canvas, name)[0]
        expected = model.score(canvas, first.mask, first.hide).detach()[shuffled]
        assert torch.equal(redrawn.mask, first.mask[shuffled]) and (found - expected).abs().max() < 2e-6


def test_columns_of_pads_change_no_score(exact_model: UnifiedModel, rows: list[Interleaved]) -> None:
    model, canvas = exact_model, exact_model.render(rows[:3])
    long = max(rows, key=lambda r: sum(map(len, r)))
    padded = model.render([*rows[:3], Interleaved([*long, *long.response])]).rows(torch.arange(3))
    assert padded.shape[1] > canvas.shape[1]
    view = views(canvas, "random")[0]
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    mask[:, : canvas.shape[1]] = view.mask
    found, expected = model.score(padded, mask).detach(), model.score(canvas, view.mask).detach()
    assert (found[:, : canvas.shape[1]] - expected).abs().max() < 2e-6 and (found[:, canvas.shape[1] :] == 0).all()
    everywhere = canvas.rows(torch.arange(3))
    everywhere.clean.ids[~everywhere.clean.valid] = 77  # what a pad holds is of no account
    everywhere.noisy.ids[~everywhere.noisy.valid] = 88
    assert (model.score(everywhere, view.mask) - expected).abs().max() < 2e-6


def test_scores_in_chunks(exact_model: UnifiedModel, rows: list[Interleaved], monkeypatch: pytest.MonkeyPatch) -> None:
    model, canvas = exact_model, exact_model.render(rows)
    expected = model.score(canvas, canvas.sampled)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.backbone.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(unidiff.head, "LOGITS_AT_ONCE", 1000)
    found = model.score(canvas, canvas.sampled)
    assert (found - expected).abs().max() < 2e-6
    found.sum().backward()
    norm = torch.stack([g.norm() for g in gradients]).norm()
    for parameter, gradient in zip((p for p in model.backbone.parameters() if p.grad is not None), gradients):
        assert (parameter.grad - gradient).abs().max() < 1e-7 * norm  # float32 as the log-probabilities are
    model.zero_grad()


def test_later_segments_change_no_score(
    exact_model: UnifiedModel, prompts: list[Interleaved], rows: list[Interleaved]
) -> None:
    model = exact_model
    start = prompts[0] + [Segment(Modality.TEXT, torch.tensor([9, 10, model.spec.image_next]))]
    short, long = model.render([start]), model.render([start + rows[0].response])
    a = model.score(short, short.sampled).detach()
    b = model.score(long, long.sampled).detach()[:, : short.shape[1]]
    assert (a - b).abs().max() < 2e-6


def test_every_kind_of_context_counts(model: UnifiedModel, rows: list[Interleaved]) -> None:
    """The other way round: a visible token, the prompt and the mask do change scores."""
    canvas = model.render([r for r in rows if r.prompt and r.response])
    all_masked = model.score(canvas, canvas.sampled).detach()
    view = views(canvas, "random")[0]
    some = model.score(canvas, view.mask).detach()
    assert ((some - all_masked)[view.mask].abs() > 1e-3).float().mean() > 0.9
    hidden = model.score(canvas, canvas.sampled, views(canvas, "one_step")[0].hide).detach()
    assert ((hidden - all_masked)[canvas.sampled].abs() > 1e-4).float().mean() > 0.9


@each("wrong", ["prompt", "delimiter", "kept", "pad"])
def test_only_sampled_tokens_are_scored(wrong: str, model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    prompt = torch.tensor(
        [[bool(s >= 0 and row[s].prompt) for s in segment] for row, segment in zip(rows, canvas.segment.tolist())]
    )
    kept = canvas.clean.valid & ~prompt & (canvas.clean.offset >= 0) & ~canvas.sampled
    places = {"prompt": prompt, "delimiter": canvas.clean.valid & (canvas.clean.offset < 0), "kept": kept}
    places["pad"] = ~canvas.clean.valid
    mask = canvas.sampled.clone()
    mask[tuple(places[wrong].nonzero()[0])] = True
    with pytest.raises(ValueError, match="mask holds tokens that were not sampled"):
        model.score(canvas, mask)


def test_score_refuses_masks_of_another_shape(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), the canvas \(8, "):
        model.score(canvas, torch.zeros(1, 3, dtype=torch.bool))


def test_score_refuses_to_score_what_is_not_masked(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    some = canvas.sampled & (canvas.clean.offset % 2 == 0)
    with pytest.raises(ValueError, match="scored must be like mask"):
        model.score(canvas, some, scored=canvas.sampled)
    with pytest.raises(ValueError, match="scored must be like mask"):
        model.score(canvas, some[None], scored=some)


def test_masks_together_give_what_each_gives_alone(exact_model: UnifiedModel, rows: list[Interleaved]) -> None:
    """Also where a mask leaves whole segments alone, and where less is asked for than is masked."""
    model, canvas = exact_model, exact_model.render(rows)
    text, odd = canvas.sampled & (canvas.modality == 0), canvas.clean.offset % 2 == 1
    masks = torch.stack([canvas.sampled, text, canvas.sampled & odd, torch.zeros_like(text)])
    together = model.score(canvas, masks).detach()
    for mask, found in zip(masks, together, strict=True):
        assert (found - model.score(canvas, mask).detach()).abs().max() < 2e-6
    fewer = model.score(canvas, masks, scored=masks & odd).detach()
    assert (fewer - torch.where(odd, together, 0.0)).abs().max() < 2e-6 and not fewer[:, ~odd].any()


def test_nothing_masked_scores_nothing(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    assert not model.score(canvas, torch.zeros_like(canvas.sampled)).any()
    prompt = model.render([rows[0].prompt])
    assert not model.score(prompt, prompt.sampled).any()


def test_gradients_reach_every_parameter(build_model: Callable[..., UnifiedModel], rows: list[Interleaved]) -> None:
    model = build_model(seed=3)
    canvas = model.render(rows)
    model(canvas, views(canvas, "random")[0].mask).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    rows_of_head = model.backbone.lm_head.weight.grad.any(1)
    assert not rows_of_head[: model.spec.text_range[0]].any() and rows_of_head[model.spec.text_range[0] :].all()


@pytest.mark.parametrize("modality", list(Modality))
def test_log_probs_are_normalised_over_the_modality(modality: Modality, model: UnifiedModel) -> None:
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    low, high = model.spec.range_of(modality)
    for temperature in (0.5, 1.0, 2.0):
        found = model.log_probs(hidden, modality, temperature)
        assert found.shape == (2, 3, high - low) and found.dtype == torch.float32
        logits = model.backbone.lm_head(hidden)[..., low:high] / temperature
        torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.log_probs(hidden, modality, 0.0), model.log_probs(hidden, modality, 1.0))


def test_full_logits_ignore_pads(model: UnifiedModel) -> None:
    ids = torch.tensor([[9, 10, 1, 11, 12]])
    logits = model.logits(ids)
    assert logits.shape == (1, 5, model.spec.logit_rows)
    padded, valid = torch.tensor([[9, 10, 1, 11, 12, 44, 45]]), torch.tensor([[True] * 5 + [False] * 2])
    torch.testing.assert_close(model.logits(padded, valid)[:, :5], logits, rtol=1e-4, atol=1e-4)
    changed = model.logits(torch.tensor([[9, 10, 1, 11, 13]]))
    assert ((changed - logits)[0, 0].abs() > 1e-3).any()  # what stands behind is seen


# ---------------------------------------------------------------- encoding and decoding


def test_texts_and_images_come_back(model: UnifiedModel, task: FrozenLake) -> None:
    example = task.example("train", 3)
    parts = [*example.prompt, *task.demonstration(example)]
    row = model.encode(parts)
    assert all(s.prompt for s in row) and [s.modality for s in row][:2] == [Modality.TEXT, Modality.IMAGE]
    back = model.decode(row)
    for part, found in zip(parts, back):
        if isinstance(part, str):
            assert found == part
        else:
            assert found.size == part.size and found.mode == "RGB"
            assert (task.parse(pixels(found)) == task.parse(pixels(part))).all()


def pixels(image: Image.Image):
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(1, image.height, image.width, 3).numpy()


def test_a_response_ends_its_texts(model: UnifiedModel, task: FrozenLake) -> None:
    spec = model.spec
    example = task.example("train", 0)
    parts = task.demonstration(example)
    row = model.encode(parts, prompt=False)
    assert not any(s.prompt for s in row)
    ends = [int(s.tokens[-1]) for s in row if s.modality is Modality.TEXT]
    assert ends == [spec.image_next] * (len(ends) - 1) + [spec.text_end[0]]
    assert model.decode_text(row[0].tokens) == parts[0]
    assert model.encode([], prompt=False) == ()


def test_a_response_of_segments_and_pictures_of_two_sizes(model: UnifiedModel, task: FrozenLake) -> None:
    picture = task.example("train", 0).prompt[1]
    kept = model.encode([picture], prompt=True)[-1]
    row = model.encode(["from b2 go right to b3", kept, picture.resize((32, 32)), picture], prompt=False)
    assert [s.grid for s in row] == [None, (8, 8), (4, 4), (8, 8)] and not any(s.prompt for s in row)
    assert torch.equal(row[1].tokens, row[3].tokens) and int(row[0].tokens[-1]) == model.spec.image_next
    with pytest.raises(ValueError, match="cannot write 'from <unk> go': its tokenizer lacks a word of it"):
        model.encode(["from here go"], prompt=False)
    with pytest.raises(ValueError, match="the response has 1031 tokens, the model 1024 positions"):
        model.encode([picture] * 16 + ["go up"] * 3 + ["go"], prompt=False)


def test_images_of_a_batch_are_encoded_as_alone(model: UnifiedModel, task: FrozenLake) -> None:
    pictures = [task.example("train", i).prompt[1] for i in range(3)]
    for (tokens, grid), picture in zip(model.encode_images(pictures), pictures):
        ((alone, _),) = model.encode_images([picture])
        assert grid == (8, 8) and torch.equal(tokens, alone)
        assert tokens.min() >= model.spec.image_range[0] and tokens.max() < model.spec.image_range[1]
    stacked = torch.stack([t for t, _ in model.encode_images(pictures)]).reshape(3, 1, 64)
    assert model.decode_pixels(stacked, (8, 8)).shape == (3, 1, 3, 64, 64)


@each(
    ("part", "message"),
    [
        ("", "the text '' has no tokens"),
        (Image.new("RGB", (60, 64)), "sides must be multiples of 8, got 64 x 60"),
        ("go " * 1100, "1100 tokens, its response 0, and the model 1024 positions"),
    ],
)
def test_bad_parts_are_named(part: str | Image.Image, message: str, model: UnifiedModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode([part])


NO_PARTS = [
    (
        "find the goal",
        r"prompt is a str \('find the goal'\); it must be a list of str or Image( or Segment)?: write \[prompt\]",
    ),
    (b"find", r"prompt is a bytes \(b'find'\); it must be a list of str or Image"),
    ({"text": "find"}, "prompt is a dict"),
    (Image.new("RGB", (64, 64)), "prompt is a Image .* write"),
    (None, "prompt is a NoneType"),
    ([b"find"], r"prompt\[0\] is a bytes"),
    (["find", {"image": 1}], r"prompt\[1\] is a dict .*; it must be str or Image"),
    (["find", ["the", "goal"]], r"prompt\[1\] is a list"),
    (["find", Path("a.png")], r"prompt\[1\] is a PosixPath"),
    (["find", torch.zeros(3, 64, 64)], r"prompt\[1\] is a Tensor"),
]


@each(("parts", "message"), NO_PARTS)
def test_what_is_no_list_of_parts_is_refused(
    parts: Any, message: str, model: UnifiedModel, published: Callable[[str], Path]
) -> None:
    for own in (model, UnifiedModel.from_pretrained(published("mmada"))):
        for call in (partial(rollout, own), own.encode, own.encode_prompt):
            with pytest.raises(TypeError, match=message):
                call(parts)
        with pytest.raises(TypeError, match=message.replace("prompt", "response")):
            own.encode(parts, prompt=False)


def test_one_thing_in_place_of_a_batch_is_refused(model: UnifiedModel, published: Callable[[str], Path]) -> None:
    image, one = Image.new("RGB", (64, 64)), model.encode(["find the goal"])
    with pytest.raises(TypeError, match="images is a Image"):
        model.encode_images(image)  # type: ignore[arg-type]
    for rows in (one, ["find the goal"], [["find"]]):
        with pytest.raises(TypeError, match=r"rows\[0\] is a (Segment|str|list) .*; it must be Interleaved"):
            model.render(rows)  # type: ignore[arg-type]
    sampler = InterleavedSampler(model, SamplerConfig(edit="full"))
    for prompts, wrong in ((one, r"\[0\] is a Segment"), ("find", " is a str"), ([["find"]], r"\[0\] is a list")):
        with pytest.raises(TypeError, match=f"prompts{wrong}"):
            sampler.sample(prompts, [1])  # type: ignore[arg-type]
    other = UnifiedModel.from_pretrained(published("mmada"))
    layout = other.template.text("find", 2)  # type: ignore[union-attr]
    for layouts in (layout, [layout.conditional], "find"):
        with pytest.raises(TypeError, match=r"layouts.* it must be .*Guided"):
            fill(other, layouts, [1], SamplerConfig())  # type: ignore[arg-type]
    for call in (other.template.prompt, lambda parts: other.template.interleaved(parts, ["go"])):  # type: ignore[union-attr]
        with pytest.raises(TypeError, match="prompt is a str"):
            call("find")
    with pytest.raises(TypeError, match="response is a str"):
        other.template.interleaved(["find"], "go")  # type: ignore[union-attr]


def test_images_of_another_grid_are_refused(model: UnifiedModel) -> None:
    row = model.encode(["go", Image.new("RGB", (64, 128))])
    with pytest.raises(ValueError, match=r"embeds images of \(8, 8\) tokens, not of \[\(16, 8\)\]"):
        model.render([row])


def test_sequences_too_long_are_refused(model: UnifiedModel, prompts: list[Interleaved]) -> None:
    with pytest.raises(ValueError, match=r"a sequence of 1\d\d\d tokens exceeds the 1024 positions"):
        model.render([Interleaved(prompts[0][1:] * 16)])


def test_no_call_moves_the_global_random_state(
    rng_untouched: None, build_model: Callable[..., UnifiedModel], task: FrozenLake, rows: list[Interleaved]
) -> None:
    """Invariant 6."""
    model = build_model(seed=11)
    model.decode(model.encode(task.example("train", 0).prompt))
    canvas = model.render(rows)
    for name in ESTIMATORS:
        for view in views(canvas, name):
            model.score(canvas, view.mask, view.hide)


@each("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float16", None])
def test_a_dtype_that_weights_cannot_have_is_named(dtype: Any, published: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; choose one of torch\.float64, torch\.float32, torch\.float16"):
        UnifiedModel.from_pretrained(published("llada"), dtype=dtype)
