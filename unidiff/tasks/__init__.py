"""Tasks: examples and rewards for runs."""

from unidiff.tasks.frozen_lake import FrozenLake
from unidiff.tasks.mix import mix
from unidiff.tasks.names import resolve
from unidiff.tasks.rows import Rows
from unidiff.tasks.task import Example, Task

__all__ = ["Example", "FrozenLake", "Rows", "Task", "mix", "resolve"]
