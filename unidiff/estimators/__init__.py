"""Log-probability estimators: which sampled tokens are masked, and scored, in each inner iteration.

A masked diffusion model has no cheap exact probability of a whole text or image. An estimator asks for the
probability of some tokens while they are masked and the others stand, once or in several views, and makes of the
answers a value for each token, or one for each segment. Its choice is data: drawn once for a batch of rollouts, it
serves the old, the reference and the new policy alike.

A method is a frozen dataclass in a file of its own, registered by name:

    @register("mine")
    @dataclass(frozen=True)
    class Mine(Estimator):
        rate: float = 0.5

        def mask(self, canvas, place, modality, iteration, iterations, keys_B): ...

Dimensions: B rows, L columns of `Canvas.clean`, K views.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from unidiff import plugins
from unidiff.config import check_fields, convert
from unidiff.estimators.checks import check_values, checked_views
from unidiff.estimators.view import Draw, Place, View, segment_uniform, token_uniform
from unidiff.guidance import Guidance
from unidiff.sequence import Canvas, Modality

__all__ = ["ESTIMATORS", "Draw", "Estimator", "Place", "View", "combine", "draw_views", "make", "parse"]
__all__ += ["register", "run_view", "run_views", "score", "segment_uniform", "token_uniform"]


class Estimator:
    """Base of all methods. A method gives `mask`, or `views` where one is not enough.

    unit: "token": each token has a value, its log-probability as the method estimates it. "segment": a segment has
    one, and all of its scored tokens share it: so they share their ratio too, and the segment counts in the loss as if
    all of its sampled tokens were scored.
    ratio: the loss is GRPO's, with the ratio of new to old policy. False: it is −advantage · value, of the current
    policy alone; clipping and the loss types' own ratios have no say.
    """

    unit: ClassVar[Literal["token", "segment"]] = "token"
    ratio: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, f"{type(self).__name__}.")

    def mask(
        self,
        canvas: Canvas,
        place: Place,
        modality: Modality,
        iteration: int,
        iterations: int,
        keys_B: Tensor,
    ) -> Tensor:
        """[B, L] bool: sampled tokens of a modality to mask, at least one in each segment that has any.

        iteration: 0 … iterations-1. keys_B: [B] int64, noise keys.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mask or views")

    def hide(self, canvas: Canvas, iteration: int, keys_B: Tensor) -> Tensor | None:
        """[B, L] bool: prompt tokens to mask in all views that do not say so themselves; not scored. None = none."""
        return None

    def views(
        self,
        canvas: Canvas,
        place: Place,
        modality: Modality,
        iteration: int,
        iterations: int,
        keys_B: Tensor,
    ) -> list[View]:
        """What an inner iteration asks, one view or more, alike in number for all rows."""
        return [View(self.mask(canvas, place, modality, iteration, iterations, keys_B))]

    def combine(self, logp_KBL: Tensor, factor_KBL: Tensor, place: Place, advantage_BL: Tensor) -> Tensor:
        """Values [B, L] float32 from the log-probabilities of this method's views: Σ_k factor · ℓ, summed over the
        segment if that is the unit. It is differentiated, and must not mix segments.

        factor_KBL: float, the views' factors, 0 where a token is not scored. advantage_BL: float, of each token, as
        `credit` gives it.
        """
        value_BL = (logp_KBL * factor_KBL).sum(0)
        return place.total(value_BL) if self.unit == "segment" else value_BL

    def credit(self, advantage_N: Tensor, group_N: Tensor) -> Tensor:
        """What the loss uses in place of the advantages, [N] float32. group_N: int64, equal for segments that are
        compared with each other: the k-th ones of their modality in the rollouts of one prompt."""
        return advantage_N


ESTIMATORS: dict[str, type[Estimator]] = {}
_E = TypeVar("_E", bound=type[Estimator])


def register(name: str) -> Callable[[_E], _E]:
    """Class decorator: adds a method to the registry. Raises TypeError if it is no `Estimator` or no dataclass,
    ValueError for a name or a unit that cannot be."""

    def add(estimator: _E) -> _E:
        if not (isinstance(estimator, type) and issubclass(estimator, Estimator)):
            raise TypeError(f"estimator {name!r} must be a class derived from unidiff.estimators.Estimator")
        if not is_dataclass(estimator):
            raise TypeError(f"estimator {name!r} must be a dataclass: write @dataclass(frozen=True) below @register")
        if not name or set(name) & set(".:=") or estimator.unit not in ("token", "segment"):
            raise ValueError(f"estimator {name!r}: a name has no . : or =, and unit is 'token' or 'segment'")
        ESTIMATORS[name] = estimator
        return estimator

    return add


def make(name: str, **options: Any) -> Estimator:
    """A registered estimator with its options. Raises ValueError if the name or an option is not known, or an option
    that has no default is not given."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} is not known{_nearest(name, ESTIMATORS)}")
    known = {f.name: f for f in fields(ESTIMATORS[name])}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ValueError(f"estimator {name!r} has no option {option!r}{_nearest(option, known)}")
    for option, field in known.items():
        if field.default is field.default_factory is MISSING and option not in options:
            raise ValueError(f"estimator {name!r} needs its option {option!r}")
    return ESTIMATORS[name](**options)


def parse(text: str, min_ratio: float | None = None) -> Estimator:
    """An estimator as a setting names it: "trace", with options "elbo:samples=4:antithetic=no", or one of a module,
    which is imported: "package.module:name:option=value" (with a point for the first colon, too).

    An option becomes what its default is: a bool, int, float or text. min_ratio: for methods that have this option,
    unless the text gives it. Raises ValueError, as `make`, and for options that are no such thing or stand twice.
    """
    name, *pairs = text.split(":")
    if pairs and "=" not in pairs[0] and name not in ESTIMATORS:
        name = f"{name}:{pairs.pop(0)}"
    name, options = _imported(name), {}
    # By the defaults' types, not the annotations: those of a plug-in may name what is not there at run time.
    defaults = {f.name: f.default for f in fields(ESTIMATORS[name])} if name in ESTIMATORS else {}  # type: ignore[arg-type]
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"estimator {text!r}: {pair!r} is no option; write name:option=value")
        if option in options:
            raise ValueError(f"estimator {text!r}: {option} is given twice")
        default = defaults.get(option)
        if option in defaults and not isinstance(default, (bool, int, float, str)):
            raise ValueError(
                f"estimator {text!r}: {option} cannot be written so, for it has no plain default; use make"
            )
        options[option] = convert(value, type(default), f"{name}.{option}") if option in defaults else value
    if min_ratio is not None and "min_ratio" in defaults:
        options.setdefault("min_ratio", min_ratio)
    return make(name, **options)


def _imported(name: str) -> str:
    """The name that a method is registered by. "package.module:name" imports the module first; the name is the
    registered one, or the class's."""
    if not plugins.is_path(name):
        return name
    try:
        module, last = plugins.split(name)
        own = vars(plugins.import_module(module))
    except ValueError as error:
        raise ValueError(f"estimator {name}: {error}") from error
    return next((known for known, kind in ESTIMATORS.items() if kind is own.get(last)), last)


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"; known: {', '.join(sorted(known)) or 'none'}" + (f"; nearest: {close[0]}" if close else "")


# ---------------------------------------------------------------- from methods to values


def draw_views(canvas: Canvas, text: Estimator, image: Estimator, iterations: int, keys_B: Tensor) -> list[Draw]:
    """The draws of all inner iterations: text masked by one estimator, images by the other, in the same views.

    keys_B: [B] int64, one noise key a row. A view has one clean sequence: a prompt that one estimator hides
    is hidden for both. Raises ValueError if the keys do not fit the canvas or there is no iteration, and what
    `checks.checked_views` does.
    """
    if keys_B.shape != (canvas.shape[0],):
        raise ValueError(f"keys_B has shape {tuple(keys_B.shape)}, but the canvas has {canvas.shape[0]} rows")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")
    place = Place.of(canvas)
    draws = []
    for i in range(iterations):
        own = []
        for modality, estimator in ((Modality.TEXT, text), (Modality.IMAGE, image)):
            views = estimator.views(canvas, place, modality, i, iterations, keys_B)
            hide = estimator.hide(canvas, i, keys_B)
            own.append(checked_views(estimator, views, hide, canvas, place, modality))
        weight = _loss_weight(own[0], place, text) + _loss_weight(own[1], place, image)
        draws.append(Draw(_joined(*own), weight, (len(own[0]), len(own[1]))))
    return draws


def _joined(text: list[View], image: list[View]) -> list[View]:
    """The k-th views of both modalities in one, which hold different tokens."""
    few, many = sorted((text, image), key=len)
    return [_union(a, b) for a, b in zip(few, many)] + many[len(few) :]


def _union(a: View, b: View) -> View:
    hide = a.hide if b.hide is None else b.hide if a.hide is None else a.hide | b.hide
    plain = a.factor is None and b.factor is None
    return View(a.mask | b.mask, hide, None if plain else a.factors.float() + b.factors.float())


def _loss_weight(views: list[View], place: Place, estimator: Estimator) -> Tensor:
    """float32 [B, L]: 1 at tokens that a view scores; where the segment is the unit, the same for each of them, and
    the number of the segment's sampled tokens in sum."""
    scored = torch.stack([view.scored for view in views]).any(0).float()
    if estimator.unit == "token":
        return scored
    return scored * place.length / place.total(scored).clamp(min=1)


def run_view(
    model: Any,
    canvas: Canvas,
    view: View,
    temperature: tuple[float, float] = (1.0, 1.0),
    guidance: Guidance | None = None,
) -> Tensor:
    """Log-probabilities [B, L] of a view's masked tokens. Only rows in which something is scored are run; the others
    are 0. model: `UnifiedModel`, or a wrapper of it. guidance: see `UnifiedModel.score`."""
    rows = view.factors.any(1).nonzero()[:, 0]
    if 0 < len(rows) < len(view.mask):
        compared = None if guidance is None else guidance.rows(rows)
        part = run_view(model, canvas.rows(rows), view.rows(rows), temperature, compared)
        return part.new_zeros(view.mask.shape).index_put((rows,), part)
    return model(canvas, view.mask, view.hide, temperature, guidance)


def run_views(
    model: Any,
    canvas: Canvas,
    views: Sequence[View],
    temperature: tuple[float, float] = (1.0, 1.0),
    guidance: Guidance | None = None,
) -> Tensor:
    """Log-probabilities [K, B, L] of what each view scores, 0 elsewhere: those of `run_view`, in fewer forward passes.
    Views that leave the prompt as it is share one; a view that hides some of it has its own; one that scores nothing in
    these rows has none."""
    scored_K = torch.stack([view.scored for view in views]).flatten(1).any(1).tolist()
    asked = [k for k, any_scored in enumerate(scored_K) if any_scored] or [0]
    plain = [k for k in asked if views[k].hide is None]
    passes = [plain] * bool(plain) + [[k] for k in asked if views[k].hide is not None]
    parts = [_one_pass(model, canvas, [views[k] for k in own], temperature, guidance) for own in passes]
    order = torch.tensor([k for own in passes for k in own], device=parts[0].device)
    return parts[0].new_zeros(len(views), *canvas.shape).index_copy(0, order, torch.cat(parts))


def _one_pass(
    model: Any,
    canvas: Canvas,
    views: Sequence[View],
    temperature: tuple[float, float],
    guidance: Guidance | None,
) -> Tensor:
    scored_KBL = torch.stack([view.scored for view in views])
    rows = scored_KBL.any(0).any(1).nonzero()[:, 0]
    if 0 < len(rows) < canvas.shape[0]:
        compared = None if guidance is None else guidance.rows(rows)
        part = _one_pass(model, canvas.rows(rows), [view.rows(rows) for view in views], temperature, compared)
        return part.new_zeros(scored_KBL.shape).index_copy(1, rows, part)
    mask_KBL = torch.stack([view.mask for view in views])
    return model(canvas, mask_KBL, views[0].hide, temperature, guidance, scored_KBL)


def combine(
    canvas: Canvas, draw: Draw, logp_KBL: Tensor, text: Estimator, image: Estimator, advantage_BL: Tensor
) -> Tensor:
    """Values [B, L] of the scored tokens, 0 elsewhere, from the log-probabilities of a draw's views. Each estimator
    gets its own views, however many the other has. Raises ValueError if it gives another shape."""
    place, factor_KBL = Place.of(canvas), torch.stack([view.factors.float() for view in draw.views])
    values = []
    for e, count in zip((text, image), draw.counts):
        values.append(e.combine(logp_KBL[:count], factor_KBL[:count], place, advantage_BL))
        check_values(e, "combine", values[-1], canvas.shape)
    value_BL = torch.where(canvas.modality == Modality.IMAGE, values[1], values[0])
    return torch.where(draw.weight != 0, value_BL, 0.0)


def score(
    model: Any,
    canvas: Canvas,
    draw: Draw,
    text: Estimator,
    image: Estimator,
    advantage_BL: Tensor,
    temperature: tuple[float, float] = (1.0, 1.0),
    guidance: Guidance | None = None,
) -> Tensor:
    """Values [B, L] of a policy: all views of a draw, run one by one and combined."""
    logp_KBL = torch.stack([run_view(model, canvas, view, temperature, guidance) for view in draw.views])
    return combine(canvas, draw, logp_KBL, text, image, advantage_BL)


from unidiff.estimators import coupled as coupled  # noqa: E402  (each registers its method)
from unidiff.estimators import elbo as elbo  # noqa: E402
from unidiff.estimators import fading_out as fading_out  # noqa: E402
from unidiff.estimators import image_random as image_random  # noqa: E402
from unidiff.estimators import left_to_right as left_to_right  # noqa: E402
from unidiff.estimators import one_step as one_step  # noqa: E402
from unidiff.estimators import random_mask as random_mask  # noqa: E402
from unidiff.estimators import spg as spg  # noqa: E402
from unidiff.estimators import trace as trace  # noqa: E402
from unidiff.estimators import wd1 as wd1  # noqa: E402
