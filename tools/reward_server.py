"""Serves reward functions over HTTP, for scorers that need an environment of their own.

    python tools/reward_server.py --scorers my_scorers.py:aesthetic,my_package.rewards:length --port 8000

This file stands alone: copy it into the other environment (Python 3.10, fastapi, uvicorn, pillow; no unidiff).
A scorer is a function `f(segments, **metadata) -> list of numbers or None`, as a reward of unidiff is: each segment
has `text`, `image` (PIL), `texts_before`, `images_before`, `image_before`, `prompt`, `texts`, `images` and `columns`;
each entry of the metadata comes as a list. The client is `unidiff.rewards.remote.remote`; the protocol stands there.

Requests that wait are put together to batches, one at a time for each scorer. A batch that raises is tried again item
by item, so a bad item costs its own value only. Whoever can reach the port can use it: keep it on your own network.

GET /health says what is served, and how much waits.
"""

import argparse
import base64
import binascii
import importlib
import importlib.util
import inspect
import io
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from PIL import Image

from unidiff.program import run_program

PIXELS = 4096 * 4096  # of one picture: a small file may hold a very large one
PIXELS_OF_REQUEST = 1 << 28  # 256 pictures of 1024 x 1024, 0.8 GB


class BadItemError(ValueError):
    """An item that is not of the protocol."""


class Allowance:
    """How many pixels the pictures of a request may still have."""

    def __init__(self) -> None:
        self.left = PIXELS_OF_REQUEST

    def take(self, image: Any) -> None:
        """Raises BadItemError if a picture has too many. Only its header has been read."""
        pixels = image.width * image.height
        if pixels > PIXELS:
            raise BadItemError(f"a picture has more than {PIXELS} pixels")
        if pixels > self.left:
            raise BadItemError(f"the request's pictures have more than {PIXELS_OF_REQUEST} pixels: send fewer items")
        self.left -= pixels


class Item:
    """One item of a request, as a scorer sees it."""

    def __init__(self, request: Any, allowance: Allowance) -> None:
        if not isinstance(request, dict) or not isinstance(request.get("history"), list) or not request["history"]:
            raise BadItemError("an item needs a history with at least one part")
        self.columns = request.get("metadata") or {}
        if not isinstance(self.columns, dict):
            raise BadItemError("metadata must be an object")
        parts = [(part.get("role"), _content(part, allowance)) for part in map(_object, request["history"])]
        self.prompt = [content for role, content in parts if role == "prompt"]
        response = [content for role, content in parts if role != "prompt"]
        self.texts = [part for part in response if isinstance(part, str)]
        self.images = [part for part in response if not isinstance(part, str)]
        last = parts[-1][1]
        self.text = last if isinstance(last, str) else None
        self.image = None if isinstance(last, str) else last
        self.texts_before = [part for part in response[:-1] if isinstance(part, str)]
        self.images_before = [part for part in response[:-1] if not isinstance(part, str)]
        given = [part for part in self.prompt if not isinstance(part, str)]
        self.image_before = [None, *given, *self.images_before][-1]


def _object(part: Any) -> dict:
    if not isinstance(part, dict):
        raise BadItemError("a part of a history must be an object")
    return part


def _content(part: dict, allowance: Allowance) -> Any:
    if isinstance(part.get("text"), str):
        return part["text"]
    if not isinstance(part.get("image_b64"), str):
        raise BadItemError("a part of a history needs a text or an image_b64")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(part["image_b64"], validate=True)))
        allowance.take(image)
        return image.convert("RGB")
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadItemError(f"a picture cannot be read: {type(error).__name__}") from error


# --- scorers ----------------------------------------------------------------------------------------------------------


def find(name: str) -> Callable:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    place, _, attribute = name.rpartition(":")
    if not place:
        raise SystemExit(f"error: {name!r} names no function; write package.module:function or file.py:function")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None  # a name that ends in .py has a loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, attribute)


class Scorer:
    """One function, its queue, and the thread that calls it."""

    def __init__(self, name: str, function: Callable, batch: int, wait_seconds: float, waiting: int) -> None:
        self.name, self.batch, self.wait_seconds = name, batch, wait_seconds
        self.function = getattr(function, "function", function)  # a Reward of unidiff holds its function
        if inspect.iscoroutinefunction(self.function):
            raise SystemExit(f"error: scorer {name!r} is async; the server calls plain functions")
        kinds = inspect.signature(self.function).parameters
        self.first = next(iter(kinds))
        self.takes = None if any(p.kind is p.VAR_KEYWORD for p in kinds.values()) else set(kinds) - {self.first}
        self.queue: queue.Queue[tuple[Item, Future]] = queue.Queue(waiting)
        self.scored = self.failed = self.batches = 0
        threading.Thread(target=self._serve, daemon=True, name=f"scorer-{name}").start()

    def put(self, item: Item) -> Future:
        """Raises queue.Full if too many wait."""
        future: Future = Future()
        self.queue.put_nowait((item, future))
        return future

    def _serve(self) -> None:
        while True:
            waiting = [self.queue.get()]
            end = time.monotonic() + self.wait_seconds
            while len(waiting) < self.batch:
                try:
                    waiting.append(self.queue.get(timeout=max(end - time.monotonic(), 0)))
                except queue.Empty:
                    break
            waiting = [(item, future) for item, future in waiting if future.set_running_or_notify_cancel()]
            if not waiting:
                continue
            for (_, future), (value, error) in zip(waiting, self._score([item for item, _ in waiting])):
                self.scored += error is None
                self.failed += error is not None
                future.set_result((value, error))

    def _score(self, items: list) -> list:
        """(value, None) or (None, why not) for each item."""
        self.batches += 1
        try:
            return [_checked(value) for value in self._call(items)]
        except BaseException as error:
            if len(items) > 1:
                return [self._score([item])[0] for item in items]
            return [(None, f"{type(error).__name__}: {error}"[:500])]

    def _call(self, items: list) -> list:
        names = {name for item in items for name in item.columns}
        names = names if self.takes is None else names & self.takes
        values = self.function(items, **{n: [item.columns.get(n) for item in items] for n in names})
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        if len(values) != len(items):
            raise ValueError(f"the scorer gave {len(values)} values for {len(items)} items")
        return values

    def health(self) -> dict:
        counts = {"scored": self.scored, "failed": self.failed, "batches": self.batches}
        return {"batch": self.batch, "waiting": self.queue.qsize(), **counts}


def _checked(value: Any) -> tuple:
    """(value, None) for None, a finite number or a dictionary of them; else (None, why not)."""
    if isinstance(value, dict):
        pairs = {key: _checked(one) for key, one in value.items()}
        wrong = [error for _, error in pairs.values() if error]
        return (None, wrong[0]) if wrong else ({key: one for key, (one, _) in pairs.items()}, None)
    if value is None:
        return None, None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None, f"the scorer gave {str(value)[:100]!r}, which is no number"
    return (number, None) if math.isfinite(number) else (None, f"the scorer gave {number}")


# --- the server -------------------------------------------------------------------------------------------------------


class BodyLimit:
    """Refuses bodies of more than so many bytes before they are read whole, whatever length they claim."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                answer = JSONResponse({"detail": f"the body has more than {self.most} bytes"}, 413)
                return await answer(scope, receive, send)
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)


def build(
    scorers: "dict[str, Callable]",
    batch: int = 64,
    wait_seconds: float = 0.005,
    body: int = 256 << 20,
    items: int = 256,
    waiting: int = 4096,
) -> FastAPI:
    """The application. batch: most items in one call of a scorer. wait_seconds: for others to share it. body, items:
    most bytes and items of one request. waiting: most items in a scorer's queue, beyond which clients are told 503."""
    import asyncio

    from fastapi import Request

    served = {name: Scorer(name, function, batch, wait_seconds, waiting) for name, function in scorers.items()}
    started = time.monotonic()
    app = FastAPI(title="reward server", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=body)

    def refuse(status: int, why: str) -> JSONResponse:
        return JSONResponse({"detail": why}, status, {"retry-after": "1"} if status == 503 else None)

    @app.get("/health")
    async def health() -> dict:
        state = {name: one.health() for name, one in served.items()}
        return {"status": "ok", "seconds": round(time.monotonic() - started, 1), "scorers": state}

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        try:
            given = await request.json()
        except ValueError:
            return refuse(400, "the body is no JSON")
        requests = given.get("requests") if isinstance(given, dict) else None
        if not isinstance(requests, list):
            return refuse(400, "the body has no list of requests")
        if len(requests) > items:
            return refuse(413, f"{len(requests)} items; at most {items} are taken at a time")
        asked, errors = await asyncio.to_thread(enlist, served, requests)
        if asked is None:
            return refuse(503, "too many items wait")
        results: list = [{} for _ in requests]
        for i, name, future in asked:
            value, error = await asyncio.wrap_future(future)
            results[i][name] = value
            if error is not None:
                errors[i] = {**(errors[i] or {}), name: error}
        return JSONResponse({"results": results, "errors": errors})

    return app


def enlist(served: "dict[str, Scorer]", requests: list) -> "tuple[list | None, list]":
    """Puts every item into the queues of its scorers: (index, name, future) of each, and what is wrong with items.
    None instead of the futures if a queue is full."""
    asked: list = []
    errors: list = [None] * len(requests)
    allowance = Allowance()
    for i, request in enumerate(requests):
        names = request.get("required_rewards") if isinstance(request, dict) else None
        if not isinstance(names, list) or not names:
            errors[i] = "an item needs a list of required_rewards"
            continue
        unknown = [name for name in names if name not in served]
        errors[i] = {str(name): f"not served here; there are: {', '.join(served)}" for name in unknown} or None
        try:
            item = Item(request, allowance)
        except BadItemError as error:
            errors[i] = str(error)
            continue
        try:
            asked += [(i, name, served[name].put(item)) for name in names if name in served]
        except queue.Full:
            for _, _, future in asked:
                future.cancel()
            return None, errors
    return asked, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorers", required=True, help="[name=]package.module:function, with commas between them")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64, help="most items in one call of a scorer")
    parser.add_argument("--wait", type=float, default=0.005, help="seconds to wait for others to share a batch")
    parser.add_argument("--items", type=int, default=256, help="most items of one request")
    parser.add_argument("--body", type=int, default=256 << 20, help="most bytes of one request")
    given = parser.parse_args()
    scorers = {}
    for word in given.scorers.split(","):
        name, equals, place = word.partition("=")
        function = find(place if equals else name)
        scorers[name if equals else getattr(function, "name", function.__name__)] = function
    app = build(scorers, given.batch, given.wait, given.body, given.items)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    run_program(main)
