"""Estimators in a file outside the package, written as docs/estimators.md says: registered, chosen, trained with."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, estimators, noise
from unidiff.estimators import ESTIMATORS, make, parse, register
from unidiff.rewards.reward import reward
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


@pytest.fixture
def plugin(registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module with the classes of the page, imported from a folder of the user's; forgotten afterwards."""
    page = PAGE.read_text().split("## Adding one")[1]
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    classes = [block for block in blocks if "@register" in block]
    assert len(classes) == 4
    (tmp_path / "my_estimators.py").write_text("\n".join(classes))
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_estimators")
    yield
    del sys.modules["my_estimators"]


@reward(on="text")
def odd(segments, **columns):
    return [float(s.tokens.sum() % 5) for s in segments]


@reward(on="image")
def bright(segments, **columns):
    return [float(s.pixels.mean()) for s in segments]


def test_methods_of_the_page_train(plugin: None, model: UnifiedModel, tmp_path: Path) -> None:
    pairs = ("halves", "one_block:share=0.25"), ("fading_in", "halves"), ("soft_best", "soft_best")
    for text, image in pairs:
        config = GRPOConfig(
            text_estimator=text, image_estimator=image, output_dir=str(tmp_path / text), quiet=True, num_prompts=2,
            num_generations=2, num_iterations=2, max_rounds=1, edit="random", image_steps=2, text_steps=2,
            text_threshold=None,
        )  # fmt: skip
        trainer = GRPOTrainer(copy.deepcopy(model), FrozenLake(), config, [odd, bright])
        metrics, experience = trainer.step(0)
        assert metrics["ratio_first_iteration_max_dev"] < 1e-4 and metrics["grad_norm"] > 0
        assert all(math.isfinite(v) for v in metrics.values())
        assert [len(d.views) for d in experience.draws] == [
            2,
            2,
        ]  # of halves or soft_best, beside which another has one
    assert type(parse("one_block:share=0.25")).__module__ == "my_estimators"
    assert parse("fading_in", 0.7) == make("fading_in", min_ratio=0.7)


def test_a_segment_value_is_shared_by_its_tokens(plugin: None, model: UnifiedModel, prompts: list) -> None:
    rows = [p + model.encode(["go", "find"], prompt=False) for p in prompts[:2]]
    canvas, method = model.render(rows), make("halves")
    (draw,) = estimators.draw_views(canvas, method, method, 1, torch.tensor([1, 2]))
    with torch.no_grad():
        logp_KBL = estimators.run_views(model, canvas, draw.views)
    value, parts = (
        estimators.values_of(canvas, draw, logp_KBL, method, method, torch.ones(canvas.shape)),
        logp_KBL.sum(0),
    )
    for b in range(2):
        for s in set(canvas.segment[b][canvas.sampled[b]].tolist()):
            own = canvas.sampled[b] & (canvas.segment[b] == s)
            assert value[b][own].tolist() == pytest.approx([parts[b][own].mean().item()] * int(own.sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["soft_best", "halves", "one_block", "fading_in"])
def test_values_depend_on_no_other_method_and_no_company(
    plugin: None, model: UnifiedModel, sample: Callable[..., list[Rollout]], name: str
) -> None:
    """Whatever views the pictures have, and whatever rows stand beside."""
    rows, method, found = [r.sequence for r in sample(edit="random", max_rounds=2)], make(name), []
    for image in ("image_random", "elbo:samples=8", "coupled", "left_to_right", name):
        for own in ([0], [*range(len(rows))], [1, 0]):
            canvas, pair = model.render([rows[i] for i in own]), (method, parse(image))
            (draw,) = estimators.draw_views(canvas, *pair, 1, torch.tensor([noise.key(5, i) for i in own]))
            at = torch.tensor([own.index(0)])
            canvas, draw = canvas.rows(at), draw.rows(at)
            with torch.no_grad():
                logp_KBL = estimators.run_views(model, canvas, draw.views)
            value = estimators.values_of(canvas, draw, logp_KBL, *pair, torch.ones(canvas.shape))
            found.append(value[canvas.sampled & (canvas.modality == Modality.TEXT)])
    assert bool((canvas.sampled & (canvas.modality == Modality.IMAGE)).any()) and bool((found[0] < 0).any())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sign", [":", "."])
def test_a_setting_can_name_the_module(plugin: None, sign: str) -> None:
    """And it is imported, so that the command line knows methods of one's own."""
    for known in ("halves", "one_block"):
        del ESTIMATORS[known]
    del sys.modules["my_estimators"]
    share = f"my_estimators{sign}one_block:share=0.25"
    config = GRPOConfig(text_estimator=f"my_estimators{sign}Halves", image_estimator=share)
    text, image = config.estimators()
    assert type(text) is ESTIMATORS["halves"] and image == make("one_block", share=0.25)
    for wrong, message in (
        (f"my_estimators{sign}third", "text_estimator: estimator 'third' is not known.* did you mean "),
        (f"my_estimator{sign}halves", "estimator .* No module named 'my_estimator'; did you mean 'my_estimators'"),
        (f"my_estimators{sign}halves:share=1", "estimator 'halves' has no option 'share'"),
    ):
        with pytest.raises(ValueError, match=message):
            GRPOConfig(text_estimator=wrong)


def test_what_is_no_estimator_is_refused() -> None:
    for thing in (object, lambda: None):
        with pytest.raises(TypeError, match="estimator 'mine' must be a class derived from"):
            register("mine")(thing)  # type: ignore[type-var]
    assert "mine" not in ESTIMATORS
