"""Log-probability estimators: the interface, the registry, the scoring code, and one file per method."""

from unidiff.estimators import (
    coupled,
    elbo,
    fading_out,
    image_random,
    left_to_right,
    one_step,
    random_mask,
    spg,
    trace,
    transition,
    two_times,
    wd1,
    weighted_elbo,
)
from unidiff.estimators.estimator import Ask, Estimator
from unidiff.estimators.registry import ESTIMATORS, make, parse, register
from unidiff.estimators.scoring import draw_views, run_views, values_of
from unidiff.estimators.view import Draw, Place, View

__all__ = [
    "ESTIMATORS",
    "Ask",
    "Draw",
    "Estimator",
    "Place",
    "View",
    "coupled",
    "draw_views",
    "elbo",
    "fading_out",
    "image_random",
    "left_to_right",
    "make",
    "one_step",
    "parse",
    "random_mask",
    "register",
    "run_views",
    "spg",
    "trace",
    "transition",
    "two_times",
    "values_of",
    "wd1",
    "weighted_elbo",
]  # fmt: skip
