"""Rewards from another process or machine over HTTP.

`remote` speaks JSON (tools/reward_server.py serves it): POST <url>/score with

    {"requests": [{"history": [{"role": "prompt", "text": "…"}, {"role": "response", "image_b64": "<PNG>"}, …],
                   "required_rewards": ["<name>"], "metadata": {"<column>": …}}, …]}

The last part of a history is judged (for a reward on sequences: the whole response). The answer is

    {"results": [{"<name>": 0.5}, …], "errors": [null, {"<name>": "why not"}, …]}

with one entry per request. A result may also be a dictionary of figures, from which `metric` is taken; null means "not
applicable". `pickled` speaks the older protocol of pickles over HTTP (servers of flow_grpo and its relatives).

A failed batch loses only its own items, and an error of one item loses only that item. An item with a column that
cannot be serialised is lost without being sent.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import io
import json
import pickle
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from unidiff.config import typed
from unidiff.images.picture import rgb
from unidiff.rewards.reward import Cause, Missing, Reward, reward
from unidiff.rewards.segment_view import SegmentView, SequenceView, parts_of, prompt_text
from unidiff.scorers.endpoint import Answer, Endpoint, EndpointError, json_of

View = SegmentView | SequenceView
Values = list[float | Missing | None]
Item = TypeVar("Item")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file. Raises ValueError if RGB cannot hold its values (see `rgb`)."""
    buffer = io.BytesIO()
    rgb(image).save(buffer, kind, **options)
    return buffer.getvalue()


async def in_batches(
    items: Sequence[Item | Missing], ask: Callable[[list[Item]], Awaitable[Values]], batch: int, parallel: int
) -> Values:
    """Calls `ask` on each batch. If a batch fails, its items become `Missing`. Items that are `Missing` already are not
    sent."""
    gate = asyncio.Semaphore(parallel)
    values: Values = [item if isinstance(item, Missing) else None for item in items]
    asked = [i for i, item in enumerate(items) if not isinstance(item, Missing)]

    async def one(places: list[int]) -> None:
        async with gate:
            try:
                answer = await ask([items[i] for i in places])  # type: ignore[misc]
            except EndpointError as error:
                answer = [Missing(error.cause, str(error))] * len(places)
        for i, value in zip(places, answer):
            values[i] = value

    await asyncio.gather(*(one(asked[i : i + batch]) for i in range(0, len(asked), batch)))
    return values


def plain(value: Any) -> Any:
    """Converts a value for JSON: NumPy's and torch's to numbers and lists, dates to ISO texts. Raises TypeError for
    other values."""
    kind = value.dtype.kind if isinstance(value, np.ndarray | np.generic) else ""
    if kind == "M" and np.all(value == value):  # NaT does not equal itself (nor does pandas', below)
        return np.asarray(value).astype(str).tolist()
    if (kind and kind not in "mMV") or isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time) and value == value:
        return value.isoformat()
    raise TypeError(f"JSON cannot hold a {type(value).__name__}")


def no_column(view: View, name: str) -> Missing:
    return Missing(Cause.RAISED, f"this row has no column {name!r}; it has: {', '.join(view.columns)}")


def column_of(view: View, name: str) -> Any:
    """A column as plain data, or `Missing` if it cannot be sent."""
    if name not in view.columns:
        return no_column(view, name)
    try:
        return json.loads(json.dumps(view.columns[name], default=plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        return Missing(Cause.WRONG_TYPE, f"column {name!r} cannot be sent as JSON: {error}"[:300])


def _checked(batch: int, parallel: int) -> None:
    if batch < 1 or parallel < 1:
        raise ValueError(f"batch={batch!r}, parallel={parallel!r}; both must be 1 or more")


# --- JSON -------------------------------------------------------------------------------------------------------------


def request_of(view: View, scorer: str, columns: Sequence[str], pictures: dict[int, str]) -> dict[str, Any] | Missing:
    """One item of the protocol. pictures: cache of encoded pictures by `id`, as the rows of a group share pictures."""
    metadata = {name: column_of(view, name) for name in columns}
    for value in metadata.values():
        if isinstance(value, Missing):
            return value
    history: list[dict[str, str]] = []
    for role, part in parts_of(view):
        if isinstance(part, str):
            history.append({"role": role, "text": part})
            continue
        if id(part) not in pictures:
            try:
                pictures[id(part)] = base64.b64encode(encoded(part)).decode()
            except (TypeError, ValueError) as error:
                return Missing(Cause.WRONG_TYPE, f"a picture of the {role} cannot be sent: {error}")
        history.append({"role": role, "image_b64": pictures[id(part)]})
    return {"history": history, "required_rewards": [scorer], "metadata": metadata}


@typed
def remote(
    url: str,
    scorer: str,
    *,
    columns: Sequence[str] = (),
    metric: str = "score",
    batch: int = 16,
    parallel: int = 4,
    seconds: float = 60.0,
    retries: int = 3,
    **options: Any,
) -> Reward:
    """A reward from a server of the JSON protocol (see the module's docstring).

    url: of the server, such as "http://host:8000". scorer: the reward's name there.
    columns: the task's columns to send as metadata: plain data, NumPy's and torch's values (as numbers and lists),
        dates (as ISO text). For anything else, such as NaN, the row's value is missing; the message names the column.
    metric: the figure to take from a result with several figures. A single figure is taken whatever its name.
    batch, parallel: items per request, and concurrent requests. seconds, retries: see `Endpoint`.
    Further options (`on`, `weight`, `timeout` for all of it, …) are those of `reward`; the name is the scorer's.
    """
    _checked(batch, parallel)
    endpoint = Endpoint(url, seconds, retries)

    async def ask(part: list[dict[str, Any]]) -> Values:
        headers = {"content-type": "application/json"}
        answer = await endpoint.post("/score", content=json.dumps({"requests": part}).encode(), headers=headers)
        return read_answer(json_of(answer), scorer, metric, len(part))

    async def remote_scorer(segments: Sequence[View]) -> Values:
        pictures: dict[int, str] = {}
        return await in_batches([request_of(v, scorer, columns, pictures) for v in segments], ask, batch, parallel)

    return reward(remote_scorer, **{"name": scorer, **options})


def read_answer(answer: Any, scorer: str, metric: str, count: int) -> Values:
    """The values in a server's answer. Raises EndpointError if it violates the protocol or has a wrong length."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise EndpointError(f"the answer has no list of results: {str(answer)[:100]}", Cause.WRONG_TYPE)
    errors = answer.get("errors") or [None] * len(results)
    if len(results) != count or not isinstance(errors, list) or len(errors) != count:
        raise EndpointError(f"the answer has {len(results)} results for {count} items", Cause.WRONG_LENGTH)
    return [_value(result, error, scorer, metric) for result, error in zip(results, errors)]


def _value(result: Any, error: Any, scorer: str, metric: str) -> float | Missing | None:
    said = error.get(scorer) if isinstance(error, dict) else error
    if said:
        return Missing(Cause.RAISED, f"the server says: {str(said)[:300]}")
    if not isinstance(result, dict) or scorer not in result:
        return Missing(Cause.WRONG_TYPE, f"the server gave no {scorer!r}: {str(result)[:100]}")
    value = result[scorer]
    if isinstance(value, dict):
        value = next(iter(value.values())) if len(value) == 1 else value.get(metric, value)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return Missing(Cause.WRONG_TYPE, f"the server gave {str(value)[:100]!r} for {scorer!r}, which is not a number")


# --- pickles ----------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings, lists, dictionaries and NumPy arrays. Refuses anything else, as it could run code."""

    NUMPY = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0] == "numpy" and name in self.NUMPY) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


@typed
def pickled(
    url: str,
    *,
    key: str = "scores",
    column: str | None = None,
    extra: dict[str, Any] | None = None,
    trust_pickle: bool = False,
    batch: int = 16,
    parallel: int = 4,
    seconds: float = 120.0,
    retries: int = 2,
    name: str = "pickled",
    **options: Any,
) -> Reward:
    """A reward on images from a server of the older protocol: POST / with a pickle of {"images": [JPEG, …],
    "prompts": [text, …]}, answered by {"scores": [number, …]}.

    key: the answer's key of the scores. column: sends that column as "meta_datas" instead of prompts (GenEval).
    extra: further entries of the request, such as {"only_strict": True}.
    trust_pickle: servers of this protocol answer with a pickle, and loading a stranger's pickle can run code. False:
    only JSON answers are accepted. True: pickles too, but only plain data is loaded from them.
    """
    _checked(batch, parallel)
    endpoint = Endpoint(url, seconds, retries)

    def read(response: Answer) -> Any:
        if not trust_pickle:
            return json_of(response)
        try:
            return _PlainUnpickler(io.BytesIO(response.content)).load()
        except Exception as error:  # broken bytes can raise anything
            raise EndpointError(f"{url} answered no pickle of plain data: {error}", Cause.WRONG_TYPE) from error

    def item_of(view: View) -> tuple[bytes, Any] | Missing:
        assert isinstance(view, SegmentView) and view.image is not None
        if column is None:
            return encoded(view.image, "JPEG", quality=95), prompt_text(view)
        if column not in view.columns:
            return no_column(view, column)
        try:
            pickle.dumps(view.columns[column])
        except Exception as error:  # the user's objects can raise anything
            return Missing(Cause.WRONG_TYPE, f"column {column!r} cannot be sent as a pickle: {error}"[:300])
        return encoded(view.image, "JPEG", quality=95), view.columns[column]

    async def ask(part: list[tuple[bytes, Any]]) -> Values:
        images, said = map(list, zip(*part))
        body = {"images": images, "prompts" if column is None else "meta_datas": said}
        response = await endpoint.post("/", content=pickle.dumps({**body, **(extra or {})}))
        if not trust_pickle and response.content[:1] == b"\x80":
            message = f"{url} answered with a pickle, which can run code when it is loaded; trust_pickle=True allows it"
            raise EndpointError(message, Cause.WRONG_TYPE)
        answer = read(response)
        scores = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(scores, list | tuple | np.ndarray) or np.shape(scores) == ():
            raise EndpointError(f"{url} answered without a list {key!r}: {str(answer)[:100]}", Cause.WRONG_TYPE)
        if len(scores) != len(part):
            raise EndpointError(f"{url} answered {len(scores)} scores for {len(part)} images", Cause.WRONG_LENGTH)
        return list(scores)

    async def pickled_scorer(segments: Sequence[View]) -> Values:
        return await in_batches([item_of(view) for view in segments], ask, batch, parallel)

    return reward(pickled_scorer, on="image", name=name, **options)
