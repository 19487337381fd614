"""FrozenLake: boards, demonstrations, verifiers, pictures."""

from unidiff.tasks.frozen_lake.task import FrozenLake, LakeExample

__all__ = ["FrozenLake", "LakeExample"]
