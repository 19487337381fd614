"""Runs code that a model wrote. Standard library alone: this folder can be imported without the rest of unidiff."""

from .process import Outcome, SandboxError, Stop, namespaces_refused
from .sandbox import Case, Sandbox, TestReport

__all__ = ["Case", "Outcome", "Sandbox", "SandboxError", "Stop", "TestReport", "namespaces_refused"]
