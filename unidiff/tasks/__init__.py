"""Procedural tasks: prompts, demonstrations, verifiers and pictures."""

from unidiff.tasks.frozen_lake import Example, FrozenLake

__all__ = ["Example", "FrozenLake"]
