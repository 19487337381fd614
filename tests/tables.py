"""Tables: one test for many rows, each of which takes less time than a test's setup."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def each(names: str | tuple[str, ...], rows: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """In place of pytest.mark.parametrize: the test is called with every row, and every row that fails is named.

    Fixtures are the same for all rows, so no row may change them.
    """
    several, table = not isinstance(names, str), list(rows)
    own = names if isinstance(names, tuple) else (names,)
    assert table, "a test without rows tests nothing"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def all_rows(**fixtures: Any) -> None:
            faults = []
            for row in table:
                try:
                    test(**fixtures, **dict(zip(own, row if several else (row,), strict=True)))
                except (Exception, pytest.skip.Exception) as fault:  # a row is not left out, nor those behind it
                    fault.add_note(f"in the row {row!r}")
                    faults.append(fault)
            if faults:
                raise BaseExceptionGroup(f"{len(faults)} of {len(table)} rows", faults)

        signature = inspect.signature(test)
        assert set(own) <= signature.parameters.keys()
        left = [p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name not in own]
        all_rows.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            setattr(all_rows, name, getattr(test, name))
        if hasattr(test, "pytestmark"):
            all_rows.pytestmark = test.pytestmark  # type: ignore[attr-defined]
        return all_rows

    return decorate
