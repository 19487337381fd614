"""FrozenLake: boards, demonstrations, verifiers, pictures."""

from unidiff.tasks.frozen_lake.task import Example, FrozenLake

__all__ = ["Example", "FrozenLake"]
