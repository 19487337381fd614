"""A client for a server of POST requests: retries with back-off, and one error type.

An answer is read up to a maximum size and never decompressed, because a small compressed answer can hold gigabytes.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from unidiff import backoff
from unidiff.rewards.reward import Cause

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # status codes of temporary errors
MOST_BYTES = 4 << 20  # maximum size of an answer: about a hundred thousand figures


class EndpointError(RuntimeError):
    """There is no usable answer. cause: the `Cause` of values that are lost by it."""

    def __init__(self, message: str, cause: Cause = Cause.RAISED) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Answer:
    """A server's answer with status 200. kind: its content type."""

    url: str
    kind: str
    content: bytes


class Endpoint:
    """url: the server's address. seconds: timeout of one attempt. retries: further attempts after a temporary error (no
    connection, a broken connection, a timeout, a busy or failing server). headers: sent with every request."""

    def __init__(
        self, url: str, seconds: float = 60.0, retries: int = 3, headers: dict[str, str] | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}; it must start with http:// or https://")
        if not seconds > 0 or retries < 0:
            raise ValueError(f"seconds={seconds!r} must be above 0, retries={retries!r} 0 or more")
        self.url, self.seconds, self.retries, self.headers = url.rstrip("/"), seconds, retries, headers
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _connected(self) -> Any:
        """The client of the running event loop; a connection belongs to one loop."""
        try:
            import httpx2
        except ImportError as error:
            raise ImportError('remote scorers need httpx2: pip install "unidiff[server]"') from error
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            headers = {**(self.headers or {}), "accept-encoding": "identity"}
            self._client, self._loop = httpx2.AsyncClient(timeout=self.seconds, headers=headers), loop
        return self._client

    async def post(self, path: str, **body: Any) -> Answer:
        """POSTs `json=` or `content=` and returns the answer with status 200. Raises EndpointError."""
        for attempt in range(self.retries + 1):
            try:
                return await self._post(path, body)
            except _PassingError as error:
                if attempt == self.retries:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise EndpointError(f"{error}{tried}", error.cause) from error
            await asyncio.sleep(backoff.pause_before(attempt))
        raise AssertionError("unreachable")

    async def _post(self, path: str, body: dict[str, Any]) -> Answer:
        client = self._connected()
        import httpx2

        try:
            async with (
                asyncio.timeout(self.seconds),  # of the whole request; the client's timeout is per read
                client.stream("POST", self.url + path, **body) as response,
            ):
                content = await self._content(response)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _PassingError(f"{self.url} gave no answer in {self.seconds:g} s", Cause.TIMEOUT) from error
        except httpx2.HTTPError as error:
            raise _PassingError(f"{self.url}: {type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return Answer(str(response.url), response.headers.get("content-type", "no content type"), content)
        message = f"{self.url} answered {response.status_code}: {beginning(content, 200)}"
        raise (_PassingError if response.status_code in RETRIED else EndpointError)(message)

    async def _content(self, response: Any) -> bytes:
        """The body; a too long error body is truncated."""
        if (encoding := response.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
            message = f"{self.url} answered {response.status_code} encoded as {encoding!r}, which was not asked for"
            raise EndpointError(message, Cause.WRONG_TYPE)
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > MOST_BYTES:
                if response.status_code != 200:
                    break
                raise EndpointError(f"{self.url} answered with more than {MOST_BYTES} bytes", Cause.WRONG_TYPE)
        return bytes(content)


class _PassingError(EndpointError):
    """A temporary error: the next attempt may succeed."""


def beginning(content: bytes, most: int) -> str:
    """The beginning of a body, for a message."""
    return content[:most].decode(errors="replace").strip()


def json_of(answer: Answer) -> Any:
    """An answer's JSON. Raises EndpointError with the beginning of any other answer, such as a proxy's page."""
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        message = f"{answer.url} answered no JSON but {answer.kind}: {beginning(answer.content, 100)!r}"
        raise EndpointError(message, Cause.WRONG_TYPE) from error
