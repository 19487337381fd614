"""Reads several streams side by side, against a clock. Standard library alone."""

import os
import selectors
import time
from collections.abc import Mapping

CHUNK = 1 << 16  # bytes, as many as a pipe holds


def read(limits: Mapping[int, float], deadline: float) -> tuple[dict[int, bytearray], str | None]:
    """What comes from descriptors until all are closed, and why that was not waited for: "timeout" or "output".

    limits: most bytes of each. deadline: of time.monotonic().
    """
    said = {fd: bytearray() for fd in limits}
    with selectors.DefaultSelector() as selector:
        for fd in limits:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                return said, "timeout"
            for fd in (key.fd for key, _ in ready):
                chunk = os.read(fd, CHUNK)
                said[fd] += chunk
                if not chunk:
                    selector.unregister(fd)
                if len(said[fd]) > limits[fd]:
                    return said, "output"
    return said, None
