"""Rewards that ship. Importing this package registers their short names."""

from unidiff.scorers import code, form, math, pictures, text

__all__ = ["code", "form", "math", "pictures", "text"]
