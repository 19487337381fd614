"""Runs code that a model wrote. Standard library alone: this folder can be imported without the rest of unidiff."""

from .process import Ending, Outcome, SandboxError, namespaces_refused
from .sandbox import Case, Sandbox, TestReport

__all__ = ["Case", "Ending", "Outcome", "Sandbox", "SandboxError", "TestReport", "namespaces_refused"]
