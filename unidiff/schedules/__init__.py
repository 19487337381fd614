"""Trainable sampling schedules: the interface, the registry, and one file per method."""

from unidiff.schedules import bound, controls, planner
from unidiff.schedules.schedule import SCHEDULES, Choice, Choices, Look, Schedule, make_schedule, register_schedule

__all__ = [
    "SCHEDULES",
    "Choice",
    "Choices",
    "Look",
    "Schedule",
    "bound",
    "controls",
    "make_schedule",
    "planner",
    "register_schedule",
]
