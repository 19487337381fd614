"""Procedural tasks: prompts, demonstrations, verifiers and pictures."""

from unidiff.tasks.frozen_lake import Example, FrozenLake
from unidiff.tasks.task import Task

__all__ = ["Example", "FrozenLake", "Task"]
