"""Reward functions, what runs them, and the router. Importing this makes the short names of built-in ones known."""

from unidiff.rewards import code_tests, image, math_answers, text

__all__ = ["code_tests", "image", "math_answers", "text"]
