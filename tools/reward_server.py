"""Serves reward functions over HTTP, for scorers that need an environment of their own.

    python tools/reward_server.py --scorers my_scorers.py:aesthetic,my_package.rewards:length --port 8000

This file stands alone: copy it into the other environment (Python 3.10, fastapi, uvicorn, pillow; no unidiff).
A scorer is a function `f(segments, **metadata) -> list of numbers or None`, as a reward of unidiff is: each segment
has `text`, `image` (PIL), `texts_before`, `images_before`, `image_before`, `prompt`, `texts`, `images` and `columns`;
each entry of the metadata comes as a list. The client is `unidiff.scorers.remote.remote`; its docstring has
the protocol.

Requests that wait are put together to batches, one at a time for each scorer. A batch that raises is tried again item
by item, so a bad item costs its own value only, as does a picture that cannot be read (PNG, JPEG and WebP are). SIGTERM
and Ctrl-C end it at once. Whoever can reach the port can use it: keep it on your own network.

GET /health says what is served, and how much waits.
"""

import argparse
import asyncio
import base64
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
PIXELS = 4096 * 4096  # maximum of one picture; a small file can decode to a very large one
PIXELS_OF_REQUEST = 1 << 28  # 256 pictures of 1024 x 1024, 0.8 GB
MARKS = 2_000_000  # maximum commas and brackets of a body; a small body can parse to a very large structure


class BadItemError(ValueError):
    """An item violates the protocol."""


class Memory:
    """The remaining bytes for the bodies and pictures of all requests together."""

    def __init__(self, most: int) -> None:
        self.left, self.lock = most, threading.Lock()

    def take(self, count: int) -> None:
        """Reserves bytes. Raises queue.Full if too few are left."""
        with self.lock:
            if count > self.left:
                raise queue.Full
            self.left -= count

    def give(self, count: int) -> None:
        with self.lock:
            self.left += count


class Allowance:
    """The remaining pixels for the pictures of a request. held: bytes of the pictures so far."""

    def __init__(self, memory: Memory) -> None:
        self.left, self.held, self.memory = PIXELS_OF_REQUEST, 0, memory

    def take(self, image: Any) -> None:
        """Reserves a picture's pixels, before it is decoded. Raises BadItemError if it has too many."""
        if (pixels := image.width * image.height) > PIXELS:
            raise BadItemError(f"a picture has more than {PIXELS} pixels")
        if pixels > self.left:
            raise BadItemError(f"the request's pictures have more than {PIXELS_OF_REQUEST} pixels: send fewer items")
        self.memory.take(3 * pixels)
        self.left -= pixels
        self.held += 3 * pixels


class Item:
    """One item of a request, as passed to a scorer."""

    def __init__(self, request: Any, allowance: Allowance) -> None:
        if not isinstance(request, dict) or not isinstance(request.get("history"), list) or not request["history"]:
            raise BadItemError("an item needs a history with at least one part")
        self.columns = {} if request.get("metadata") is None else request["metadata"]
        if not isinstance(self.columns, dict):
            raise BadItemError("metadata must be an object")
        parts = [(_role(part), _content(part, allowance)) for part in request["history"]]
        self.prompt = [content for role, content in parts if role == "prompt"]
        response = [content for role, content in parts if role != "prompt"]
        self.texts = [part for part in response if isinstance(part, str)]
        self.images = [part for part in response if not isinstance(part, str)]
        last = parts[-1][1]
        self.text = last if isinstance(last, str) else None
        self.image = None if isinstance(last, str) else last
        self.texts_before = [part for part in response[:-1] if isinstance(part, str)]
        self.images_before = [part for part in response[:-1] if not isinstance(part, str)]
        self.image_before = [None, *(p for p in self.prompt if not isinstance(p, str)), *self.images_before][-1]


def _role(part: Any) -> str:
    role = part.get("role", "response") if isinstance(part, dict) else None
    if role not in ("prompt", "response"):
        raise BadItemError("a part of a history must be an object with the role 'prompt' or 'response'")
    return role


def _content(part: dict, allowance: Allowance) -> Any:
    text, picture = part.get("text"), part.get("image_b64")
    given = [value for value in (text, picture) if value is not None]
    if len(given) != 1 or not isinstance(given[0], str):
        raise BadItemError("a part of a history needs a text or an image_b64, and only one")
    if picture is None:
        return text
    try:
        with Image.open(io.BytesIO(base64.b64decode(picture, validate=True)), formats=FORMATS) as image:
            allowance.take(image)
            return rgb(image)
    except (BadItemError, queue.Full):
        raise
    except Exception as error:  # damaged files can raise anything
        raise BadItemError(f"a picture cannot be read ({', '.join(FORMATS)}): {type(error).__name__}") from error


def rgb(image: Any) -> Any:
    """A picture as a viewer shows it: EXIF orientation, 16-bit grey scaled to 8 bits, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")
    elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --- scorers ----------------------------------------------------------------------------------------------------------


def find(name: str) -> Callable:
    """The function `package.module:function` or `path/to/file.py:function`. Exits with one line if there is none."""
    place, _, attribute = name.rpartition(":")
    if not place:
        raise SystemExit(f"error: {name!r} names no function; write package.module:function or file.py:function")
    sys.path.insert(0, os.getcwd())
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None  # a .py file has a loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module can raise anything, also SystemExit
        where = f"{error.filename}, line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        said = f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
        raise SystemExit(f"error: {name!r}: {said}") from error
    if not callable(function):
        raise SystemExit(f"error: {name!r} is {function!r}; a scorer is a function")
    return function


def found(words: str) -> dict[str, Callable]:
    """Parses "function,name=function,…" to scorers by name. Exits with one line if two share a name."""
    scorers: dict[str, Callable] = {}
    for word in words.split(","):
        name, equals, place = word.partition("=")
        function = find(place if equals else name)
        if not equals:
            name = getattr(function, "name", getattr(function, "__name__", type(function).__name__))
        if name in scorers:
            raise SystemExit(f"error: two scorers are named {name!r}; write another_name={place or word}")
        scorers[name] = function
    return scorers


class Scorer:
    """One function, its queue, and the thread that calls it."""

    def __init__(self, name: str, function: Callable, batch: int, wait_seconds: float, waiting: int) -> None:
        self.name, self.batch, self.wait_seconds = name, batch, wait_seconds
        self.function = getattr(function, "function", function)  # a Reward of unidiff holds its function
        if inspect.iscoroutinefunction(self.function):
            raise SystemExit(f"error: scorer {name!r} is async; the server calls plain functions")
        kinds = inspect.signature(self.function).parameters
        self.takes = None if any(p.kind is p.VAR_KEYWORD for p in kinds.values()) else set(list(kinds)[1:])
        self.queue: queue.Queue[tuple[Item, Future]] = queue.Queue(waiting)
        self.scored = self.failed = self.batches = 0
        threading.Thread(target=self._serve, daemon=True, name=f"scorer-{name}").start()

    def put(self, item: Item) -> Future:
        """Queues an item. Raises queue.Full if too many are waiting."""
        self.queue.put_nowait((item, future := Future()))
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
        """(value, None) or (None, error) for each item."""
        self.batches += 1
        try:
            return [_checked(value) for value in self._call(items)]
        except BaseException as error:
            if len(items) > 1:
                return [self._score([item])[0] for item in items]
            try:
                return [(None, f"{type(error).__name__}: {error}"[:500])]
            except BaseException:  # its own __str__ raises
                return [(None, type(error).__name__)]

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
    """(value, None) for None, a finite number or a dictionary of them; else (None, error)."""
    if isinstance(value, dict):
        pairs = {key: _checked(one) for key, one in value.items()}
        wrong = [error for _, error in pairs.values() if error]
        return (None, wrong[0]) if wrong else ({key: one for key, (one, _) in pairs.items()}, None)
    if value is None:
        return None, None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None, f"the scorer gave {str(value)[:100]!r}, which is not a number"
    return (number, None) if math.isfinite(number) else (None, f"the scorer gave {number}")


# --- the server -------------------------------------------------------------------------------------------------------


class Reply(JSONResponse):
    """ASCII only: a client's text can contain half of a surrogate pair, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def refusal(status: int, why: str, **headers: str) -> Reply:
    return Reply({"detail": why}, status, {"retry-after": "1", **headers} if status == 503 else headers)


def parsed(body: bytes) -> Any:
    """Parses strict JSON. Raises ValueError with the fault."""

    def finite(word: str) -> float:
        if not math.isfinite(float(word)):  # also rejects NaN, Infinity and -Infinity, which Python accepts
            raise ValueError(f"{word[:100]} is not a number in JSON")
        return float(word)

    def unique(pairs: list) -> dict:
        if len(made := dict(pairs)) < len(pairs):
            raise ValueError(f"an object has a key twice: {', '.join(key for key, _ in pairs)}"[:200])
        return made

    if sum(map(body.count, (b",", b"[", b"{"))) > MARKS:
        raise ValueError(f"it has more than {MARKS} commas and brackets")
    try:
        return json.loads(body, parse_constant=finite, parse_float=finite, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class BodyLimit:
    """Reads bodies. Refuses a body with more than `most` bytes (whatever length it claims), one that takes longer than
    `seconds`, and one that exceeds the shared memory of all requests."""

    def __init__(self, app: Any, most: int, seconds: float, memory: Memory) -> None:
        self.app, self.most, self.seconds, self.memory = app, most, seconds, memory

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            answer = await asyncio.wait_for(self._read(body, receive), self.seconds)
        except asyncio.TimeoutError:  # noqa: UP041, another class in Python 3.10
            answer = refusal(408, f"the body took longer than {self.seconds:g} s", connection="close")
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        try:
            await (answer or self.app)(scope, replay, send)
        finally:
            self.memory.give(len(body))

    async def _read(self, body: bytearray, receive: Any) -> "Reply | None":
        """Fills the body; returns a reply if it is refused."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return refusal(400, "the body has not come whole")
            part = message.get("body", b"")
            if len(body) + len(part) > self.most:
                return refusal(413, f"the body has more than {self.most} bytes", connection="close")
            try:
                self.memory.take(len(part))
            except queue.Full:
                return refusal(503, "the requests that are here hold all the memory", connection="close")
            body += part
            if not message.get("more_body", False):
                return None


def build(
    scorers: "dict[str, Callable]",
    batch: int = 64,
    wait: float = 0.005,
    body: int = 256 << 20,
    items: int = 256,
    waiting: int = 4096,
    seconds: float = 600.0,
    body_seconds: float = 60.0,
    memory: int = 4 << 30,
) -> FastAPI:
    """The application. batch: maximum items in one call of a scorer. wait: seconds to wait for more items of a batch.
    body, items: maximum bytes and items of one request. waiting: maximum items in a scorer's queue; beyond it clients
    get 503. seconds: timeout of the scorers for a request; later values become errors of their items. body_seconds:
    timeout of a body's arrival. memory: maximum bytes of all requests' bodies and pictures together."""
    served = {name: Scorer(name, function, batch, wait, waiting) for name, function in scorers.items()}
    started, shared = time.monotonic(), Memory(memory)
    app = FastAPI(title="reward server", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=body, seconds=body_seconds, memory=shared)

    @app.get("/health")
    async def health() -> dict:
        state = {name: one.health() for name, one in served.items()}
        return {"status": "ok", "seconds": round(time.monotonic() - started, 1), "scorers": state}

    @app.post("/score")
    async def score(request: Request) -> Reply:
        try:
            given = await asyncio.to_thread(parsed, await request.body())
        except ValueError as error:
            return refusal(400, f"the body is not JSON: {error}"[:300])
        requests = given.get("requests") if isinstance(given, dict) else None
        if not isinstance(requests, list):
            return refusal(400, "the body has no list of requests")
        if len(requests) > items:
            return refusal(413, f"{len(requests)} items; at most {items} are taken at a time")
        allowance = Allowance(shared)
        try:
            asked, errors = await asyncio.to_thread(enlist, served, requests, allowance)
            results = await collect(asked, errors, seconds)
        except queue.Full:
            return refusal(503, "too many items wait")
        finally:
            shared.give(allowance.held)
        return Reply({"results": results, "errors": errors})

    return app


def enlist(served: "dict[str, Scorer]", requests: list, allowance: Allowance) -> "tuple[list, list]":
    """Puts every item into the queues of its scorers. Returns (index, name, future) for each, and the items' errors.
    If a queue is full, cancels what it has queued and raises queue.Full."""
    asked: list = []
    errors: list = [None] * len(requests)
    try:
        for i, request in enumerate(requests):
            try:
                names = _names(request, served)
                unknown = f"not served here; there are: {', '.join(served)}"
                errors[i] = {name[:100]: unknown for name in names if name not in served} or None
                item = Item(request, allowance)
            except BadItemError as error:
                errors[i] = str(error)
                continue
            asked += [(i, name, served[name].put(item)) for name in names if name in served]
    except queue.Full:
        for _, _, future in asked:
            future.cancel()
        raise
    return asked, errors


def _names(request: Any, served: dict) -> "list[str]":
    names = request.get("required_rewards") if isinstance(request, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadItemError("an item needs a list of required_rewards, which are names")
    names = list(dict.fromkeys(names))
    if len(names) > (most := len(served) + 16):  # some unknown names are allowed; they are reported
        raise BadItemError(f"an item asks for {len(names)} rewards; at most {most} are looked at")
    return names


async def collect(asked: list, errors: list, seconds: float) -> list:
    """The results of all items. Adds scorers' exceptions and timeouts to `errors`."""
    results: list = [{} for _ in errors]
    futures = {asyncio.wrap_future(future): (i, name) for i, name, future in asked}
    if futures:
        await asyncio.wait(futures, timeout=seconds)
    for future, (i, name) in futures.items():
        late = not future.done() and future.cancel()
        value, error = (None, f"took longer than {seconds:g} s") if late else future.result()
        results[i][name] = value
        if error is not None:
            errors[i] = {**(errors[i] or {}), name: error}
    return results


class Server(uvicorn.Server):
    """Uses the system's default signal handlers, which end the process even while a scorer hangs or holds the GIL."""

    def capture_signals(self) -> Any:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorers", required=True, help="[name=]package.module:function, with commas between them")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64, help="most items in one call of a scorer")
    parser.add_argument("--wait", type=float, default=0.005, help="seconds to wait for others to share a batch")
    parser.add_argument("--items", type=int, default=256, help="most items of one request")
    parser.add_argument("--body", type=int, default=256 << 20, help="most bytes of one request")
    parser.add_argument("--seconds", type=float, default=600.0, help="for the scorers to answer a request")
    parser.add_argument("--memory", type=int, default=4 << 30, help="bytes of all requests' bodies and pictures")
    given = vars(parser.parse_args())
    scorers, host, port = given.pop("scorers"), given.pop("host"), given.pop("port")
    for name, value in {**given, "port": port}.items():
        least, end = int(name not in ("wait", "port")) * 1e-9, 1 << 16 if name == "port" else math.inf
        if not least <= value < end:
            parser.error(f"--{name} {value} is out of range")
    app = build(found(scorers), **given)
    Server(uvicorn.Config(app, host=host, port=port, log_level="warning")).run()


if __name__ == "__main__":
    main()
