"""Runs code that a model wrote. Standard library alone: this folder can be imported without the rest of unidiff."""

from .sandbox import Outcome, Sandbox, SandboxError, Stop, TestReport

__all__ = ["Outcome", "Sandbox", "SandboxError", "Stop", "TestReport"]
