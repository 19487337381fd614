"""Supervised training: the corpus, the forms and masks that a step draws, the loss, the schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.tables import each
from unidiff import noise, supervised
from unidiff.canvas import Window, render
from unidiff.model import UnifiedModel
from unidiff.sequence import Interleaved, Modality
from unidiff.supervised import Corpus, SupervisedConfig, draw_forms, draw_mask, lr_factor, supervised_loss
from unidiff.tasks import Example, FrozenLake, Task


@pytest.fixture(scope="module")
def rows(model: UnifiedModel, task: FrozenLake) -> list[Interleaved]:
    return supervised.corpus(model, task, range(12))


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([noise.key(seed, i) for i in range(n)])


# ---------------------------------------------------------------- corpus


def test_corpus_is_the_demonstrations(model: UnifiedModel, task: FrozenLake, rows: list[Interleaved]) -> None:
    for index, row in enumerate(rows):
        example = task.example("train", index)
        parts = task.demonstration(example)
        assert [a.tokens.tolist() for a in row.prompt] == [a.tokens.tolist() for a in model.encode(example.prompt)]
        expected = model.encode(parts, prompt=False)
        assert [a.tokens.tolist() for a in row.response] == [a.tokens.tolist() for a in expected]


def test_images_of_the_corpus_carry_the_region_of_their_text(
    task: FrozenLake, model: UnifiedModel, rows: list[Interleaved]
) -> None:
    outside = 0
    for row in rows:
        before = row.prompt.last_image()
        for text, segment in zip(row.response, row.response[1:]):
            if segment.modality is Modality.IMAGE:
                region = torch.from_numpy(task.region(model.decode_text(text.tokens), (8, 8))).flatten()
                assert torch.equal(segment.edited, region) and 0 < region.sum() <= 8
                outside += int(((segment.tokens != before.tokens) & ~region).sum())
                before = segment
    assert outside == 0  # the pictures change nowhere else: an edit can draw all that has to change


class Words(Task):
    """A task whose demonstrations hold no picture."""

    def example(self, split: str, index: int) -> Example:
        return Example(["find the goal"])

    def demonstration(self, example: Example, attempt: int = 0) -> list[str]:
        return ["answer right"]


def test_demonstrations_without_pictures(model: UnifiedModel) -> None:
    (row,) = supervised.corpus(model, Words(), [0])
    assert [s.modality for s in row] == [Modality.TEXT] * 2 and row[1].tokens[-1] == model.spec.text_end[0]
    assert [s.tokens.tolist() for s in draw_forms(row, 0, 0.3)] == [s.tokens.tolist() for s in row]


# ---------------------------------------------------------------- forms and masks


@pytest.mark.parametrize("edit_extra", [0.0, 0.3, 1.0])
def test_forms_are_one_full_image_and_edits_around_their_regions(edit_extra: float, rows: list[Interleaved]) -> None:
    wide = total = 0
    picked = []
    for i, row in enumerate(rows * 20):
        out = draw_forms(row, noise.key(1, i), edit_extra)
        assert [s.tokens.data_ptr() for s in out] == [s.tokens.data_ptr() for s in row]
        images = [(a, b) for a, b in zip(row, out) if a.modality is Modality.IMAGE and not a.prompt]
        full = [b.edited is None for _, b in images]
        assert sum(full) == 1
        picked.append((len(images), full.index(True)))
        for a, b in images:
            if b.edited is not None:
                assert (b.edited | ~a.edited).all()  # never less than the region
                extra = int((b.edited & ~a.edited).sum())
                assert extra / 60 < 0.5
                total, wide = total + 1, wide + (extra > 0)
    # A few wide edits draw no token outside: with a share s ~ U(0, 1/4) of 56 tokens, about 1 in 14.
    assert (edit_extra == 0) == (wide == 0) and wide / total == pytest.approx(edit_extra * 13 / 14, abs=0.08)
    most = max(picked)[0]
    assert most > 2 and {which for count, which in picked if count == most} == set(range(most))


def test_forms_depend_on_the_key_alone(rng_untouched: None, rows: list[Interleaved]) -> None:
    def edits(key: int) -> list[object]:
        return [None if s.edited is None else s.edited.tolist() for s in draw_forms(rows[0], key, 0.5)]

    assert edits(5) == edits(5) and any(edits(5) != edits(k) for k in range(6, 12))


def test_masks_hide_sampled_tokens_at_a_ratio_of_each_segment(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render([draw_forms(r, noise.key(2, i), 0.3) for i, r in enumerate(rows * 20)])
    mask = draw_mask(canvas, keys(240))
    assert not (mask & ~canvas.sampled).any()
    ratios: dict[Modality, list[float]] = {m: [] for m in Modality}
    pairs = []
    for b in range(240):
        of_row = []
        for s in canvas.segment[b, canvas.sampled[b]].unique().tolist():
            inside = canvas.sampled[b] & (canvas.segment[b] == s)
            modality = Modality(int(canvas.modality[b, inside][0]))
            of_row.append((int(inside.sum()), mask[b, inside].double().mean().item()))
            ratios[modality].append(of_row[-1][1])
        full = [r for n, r in of_row if n == 64]
        pairs += [(full[0], of_row[0][1])]
    for found in ratios.values():
        assert torch.tensor(found).mean().item() == pytest.approx(0.5, abs=0.04)
    # Of 64 tokens the share shows the ratio itself: even over (0, 1), and of its own in each segment.
    share = torch.tensor([a for a, _ in pairs])
    assert ((share * 4).clamp(max=3).long().bincount(minlength=4) / 240 - 0.25).abs().max() < 0.1
    assert torch.corrcoef(torch.tensor(pairs).T)[0, 1].abs() < 0.2


def test_tokens_of_a_segment_are_hidden_apart(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows[:1])
    masks = torch.cat([draw_mask(canvas, keys(1, seed)) for seed in range(1000)])[:, canvas.sampled[0]].double()
    # P(hidden) = 1/2 for every token; two tokens of one segment go together as E[t²] = 1/3 says, others do not.
    assert (masks.mean(0) - 0.5).abs().max() < 0.07
    together = (masks.T @ masks / len(masks)).fill_diagonal_(1 / 3)
    segment = canvas.segment[0, canvas.sampled[0]]
    own = segment[:, None] == segment[None]
    assert (together[own] - 1 / 3).abs().max() < 0.07 and (together[~own] - 1 / 4).abs().max() < 0.07


@pytest.mark.parametrize(("window_share", "size"), [(0.0, 6), (1.0, 9)])
def test_a_batch_is_a_function_of_seed_and_step(
    window_share: float, size: int, rng_untouched: None, model: UnifiedModel, rows: list[Interleaved]
) -> None:
    def drawn(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = SupervisedConfig(batch_size=6, window_batch=9, window_share=window_share, seed=seed)
        canvas, mask = supervised.batch(model, Corpus(rows), config, step)
        return canvas.ids, mask

    first = drawn(0, 3)
    assert first[0].shape[0] == size and all(torch.equal(a, b) for a, b in zip(first, drawn(0, 3)))
    for other in (drawn(0, 4), drawn(1, 3)):
        assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_the_share_of_windows(model: UnifiedModel, rows: list[Interleaved]) -> None:
    config = SupervisedConfig(batch_size=1, window_batch=2, window_share=0.75)
    kinds = [supervised.batch(model, Corpus(rows), config, step)[1].shape[0] for step in range(120)]
    assert set(kinds) == {1, 2} and kinds.count(2) / 120 == pytest.approx(0.75, abs=0.13)


def test_windows_show_a_text_with_what_it_follows_from(rows: list[Interleaved]) -> None:
    picked = set()
    for i in range(400):
        row = rows[i % len(rows)]
        window = supervised.draw_window(row, noise.key(4, i))
        (scored,) = window.scored
        modalities = [row[s].modality for s in sorted(window.seen)]
        assert scored == max(window.seen) and 0 in window.seen and row[scored].modality is Modality.TEXT
        assert not row[scored].prompt and modalities.count(Modality.IMAGE) == 1
        assert scored - 1 in window.seen  # the picture before it
        earlier = [s for s in range(scored) if row[s].modality is Modality.TEXT]
        shown = [s for s in earlier if s in window.seen]
        assert shown == (earlier if scored == len(row) - 1 else sorted({0, earlier[-1]}))
        picked.add((i % len(rows), scored))
    assert len(picked) == sum(s.modality is Modality.TEXT and not s.prompt for row in rows for s in row)


def test_windows_are_scored_at_high_ratios(model: UnifiedModel, rows: list[Interleaved]) -> None:
    config = SupervisedConfig(window_batch=400, window_share=1.0)
    canvas, mask = supervised.batch(model, Corpus(rows), config, 0)
    assert not (mask & ~canvas.sampled).any() and (canvas.modality[canvas.sampled] == Modality.TEXT).all()
    share = mask.sum(1) / canvas.sampled.sum(1)
    assert share.mean().item() == pytest.approx(0.8, abs=0.03)
    assert (canvas.segment[canvas.sampled].unique() > 1).all()


def test_masks_do_not_depend_on_padding(model: UnifiedModel, rows: list[Interleaved]) -> None:
    longest = max(rows, key=len)
    row = Interleaved(longest[:4])
    keys = torch.tensor([noise.key(2, 0), noise.key(2, 1)])
    alone, padded = model.render([row]), model.render([row, longest])
    assert padded.shape[1] > alone.shape[1]
    length = alone.shape[1]
    assert torch.equal(draw_mask(alone, keys[:1])[0, :length], draw_mask(padded, keys)[0, :length])


def test_a_window_of_everything_before_scores_as_the_whole(exact_model: UnifiedModel, rows: list[Interleaved]) -> None:
    """What is left out behind the scored segment, or not at all, changes nothing."""
    model = exact_model
    row = max(rows, key=len)
    whole = model.render([row])
    for scored in range(2, len(row), 2):
        part = render([row], model.spec, windows=[Window(frozenset(range(scored + 1)), frozenset([scored]))])
        expected = model.score(whole, whole.sampled & (whole.segment == scored)).detach()[:, : part.shape[1]]
        assert (model.score(part, part.sampled).detach() - expected).abs().max() < 2e-6


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("changed_weight", [1.0, 4.0])
def test_loss_is_the_weighted_mean_of_each_modality(
    changed_weight: float, model: UnifiedModel, rows: list[Interleaved]
) -> None:
    canvas, mask = supervised.batch(model, Corpus(rows), SupervisedConfig(batch_size=3, window_share=0.0), 0)
    logp = model.score(canvas, mask).detach()
    sums = {m: [0.0, 0.0] for m in Modality}
    changed = 0
    for b, n in mask.nonzero().tolist():
        modality = Modality(int(canvas.modality[b, n]))
        before = int(canvas.clean.previous[b, n])
        differs = before >= 0 and before != int(canvas.ids[b, n])
        changed += differs
        weight = changed_weight if differs else 1.0
        sums[modality][0] -= weight * logp[b, n].item()
        sums[modality][1] += weight
    losses = supervised_loss(model, canvas, mask, changed_weight)
    assert changed > 0 and list(losses) == ["text", "image"]
    for modality, (total, weight) in sums.items():
        assert losses[modality.name.lower()].item() == pytest.approx(total / weight, rel=1e-4)


def test_a_loss_of_nothing_is_zero(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows[:2])
    losses = supervised_loss(model, canvas, torch.zeros_like(canvas.sampled), 4.0)
    assert [v.item() for v in losses.values()] == [0.0, 0.0]


def test_the_loss_of_a_fixed_batch_falls(build_model: Callable[[int], UnifiedModel], rows: list[Interleaved]) -> None:
    model, config = build_model(1), SupervisedConfig(batch_size=4, window_share=0.0, lr=0.02, lr_rest=1e-2)
    canvas, mask = supervised.batch(model, Corpus(rows), config, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers, history = supervised.optimizers(model, config), []
    for _ in range(30):
        losses = supervised_loss(model, canvas, mask, config.changed_weight)
        history.append([v.item() for v in losses.values()])
        sum(losses.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for first, last in zip(history[0], history[-1]):
        assert last < 0.5 * first
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_parameter_has_one_optimizer(model: UnifiedModel) -> None:
    muon, adam = (
        [p for g in o.param_groups for p in g["params"]] for o in supervised.optimizers(model, SupervisedConfig())
    )
    assert len(muon) == 2 * 7 and all(p.ndim == 2 for p in muon)
    assert {id(p) for p in muon} & {id(p) for p in adam} == set()
    assert {id(p) for p in [*muon, *adam]} == {id(p) for p in model.parameters()}


# ---------------------------------------------------------------- the schedule


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [lr_factor(step, 100, 10, 0.4) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:61] == [1.0] * 51
    assert factors[60:] == pytest.approx([(100 - i) / 40 for i in range(60, 101)]) and factors[100] == 0
    assert min(factors[:100]) > 0


@each(("steps", "warmup", "decay"), [(1, 0, 0.0), (1, 50, 0.5), (5, 50, 1.0), (20, 0, 0.0)])
def test_learning_rate_of_short_runs(steps: int, warmup: int, decay: float) -> None:
    factors = [lr_factor(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
