"""A place on the network that answers POST requests: retries with back-off, and one clear error for what goes wrong."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from unidiff.rewards.reward import Cause

RETRIED = (408, 425, 429, 500, 502, 503, 504)  # what may be over soon
PAUSE_SECONDS = 0.5  # before the first retry; each is twice as long as the one before, and up to half shorter by chance
_CHANCE = random.Random()  # not the global one, which belongs to the run


class EndpointError(RuntimeError):
    """No answer that can be used. cause: what a value that is lost by it is counted as."""

    def __init__(self, message: str, cause: Cause = Cause.RAISED) -> None:
        super().__init__(message)
        self.cause = cause


class Endpoint:
    """url: its address. seconds: for one attempt. retries: further attempts after one that failed in a way that may
    pass (no connection, a connection that broke, too slow, a busy or failing server). headers: sent each time."""

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
        """The client of the running event loop: connections cannot be used in another."""
        try:
            import httpx2
        except ImportError as error:
            raise ImportError('remote scorers need httpx2: pip install "unidiff[server]"') from error
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._client, self._loop = httpx2.AsyncClient(timeout=self.seconds, headers=self.headers), loop
        return self._client

    async def post(self, path: str, **body: Any) -> Any:
        """The response (status 200) to a POST of `json=` or `content=`. Raises EndpointError."""
        for attempt in range(self.retries + 1):
            try:
                return await self._post(path, body)
            except _PassingError as error:
                if attempt == self.retries:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise EndpointError(f"{error}{tried}", error.cause) from error
            await asyncio.sleep(PAUSE_SECONDS * 2**attempt * _CHANCE.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        client = self._connected()
        import httpx2

        try:
            async with asyncio.timeout(self.seconds):  # of the whole; the client's own is for each read
                response = await client.post(self.url + path, **body)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise _PassingError(f"{self.url} gave no answer in {self.seconds:g} s", Cause.TIMEOUT) from error
        except httpx2.HTTPError as error:
            raise _PassingError(f"{self.url}: {type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return response
        message = f"{self.url} answered {response.status_code}: {response.text[:200].strip()}"
        raise (_PassingError if response.status_code in RETRIED else EndpointError)(message)


class _PassingError(EndpointError):
    """What may be over at the next attempt."""


def json_of(response: Any) -> Any:
    """A response's JSON. Raises EndpointError with its beginning if it is none, such as a proxy's HTML page."""
    try:
        return response.json()
    except ValueError as error:
        kind = response.headers.get("content-type", "no content type")
        message = f"{response.url} answered no JSON but {kind}: {response.text[:100].strip()!r}"
        raise EndpointError(message, Cause.WRONG_TYPE) from error
