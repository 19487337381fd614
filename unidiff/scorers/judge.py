"""A judge: a vision-language model behind an OpenAI-compatible chat endpoint (vLLM, SGLang, …), with a rubric.

It sees the texts and pictures of prompt and response in order, and is told to end with "Score: <number>". Without a
score on the scale the value is missing, not 0.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import Sequence
from typing import Any

from unidiff.config import typed
from unidiff.rewards.guard import raised
from unidiff.rewards.reward import Cause, Missing, Reward, reward
from unidiff.rewards.segment_view import parts_of
from unidiff.scorers.answers import plain
from unidiff.scorers.endpoint import Endpoint, EndpointError, json_of
from unidiff.scorers.remote import Values, View, encoded

SCORE = re.compile(
    r"\bscore\b[\s*_`\"':=]*(?:is\b\s*)?(?P<score>[-+]?\d+(?:\.\d+)?)"
    r"(?:\s*(?:/|(?:out\s+)?of\b)\s*(?P<most>\d+(?:\.\d+)?))?(?P<odd>[.,]?\d|\s?-\s?\d|\s?%)?",
    re.IGNORECASE,
)
HEADS = {"prompt": "What was asked:", "response": "The response; its last part is to be judged:"}


def read_score(text: str, low: float, high: float) -> float | None:
    """The last "Score: <number>" of a text, if it is on the scale. None otherwise; also for a range ("3-5"), a
    percentage, a decimal comma, or another scale ("4/5" where `high` is 10)."""
    found = list(SCORE.finditer(plain(text)))
    if not found or found[-1]["odd"] or float(found[-1]["most"] or high) != high:
        return None
    score = float(found[-1]["score"])
    return score if low <= score <= high else None


def messages_of(view: View, rubric: str, low: float, high: float) -> list[dict[str, Any]]:
    """The chat: the rubric as system message, then prompt and response as parts of one user message."""
    end = f'Judge by this rubric. End with one line "Score: <number>", a number from {low:g} to {high:g}.'
    content: list[dict[str, Any]] = []
    part_of = ""
    for role, part in parts_of(view):
        if role != part_of:
            content.append({"type": "text", "text": HEADS[role]})
            part_of = role
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = "data:image/png;base64," + base64.b64encode(encoded(part)).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": "That was the response. Judge it, and give the score."})
    return [{"role": "system", "content": f"{rubric}\n\n{end}"}, {"role": "user", "content": content}]


@typed
def judge(
    url: str,
    model: str,
    rubric: str,
    *,
    scale: tuple[float, float] = (0, 10),
    max_tokens: int = 512,
    extra: dict[str, Any] | None = None,
    api_key_env: str | None = None,
    parallel: int = 16,
    seconds: float = 120.0,
    retries: int = 3,
    **options: Any,
) -> Reward:
    """A judge model's score, rescaled to [0, 1].

    url: of the API, such as "http://host:8000/v1". model: its name there. rubric: the criteria, in words.
    scale: the lowest and the highest score that the judge may give.
    max_tokens, extra: entries of the request; the temperature is 0 unless `extra` sets it.
    api_key_env: the environment variable with the key, if one is needed.
    parallel: concurrent requests. seconds, retries: of one request, see `Endpoint`.
    Further options (`on`, `weight`, `timeout` for all of it, …) are those of `reward`.
    """
    low, high = scale
    if not low < high or parallel < 1:
        raise ValueError(f"scale=({low:g}, {high:g}) must rise, parallel={parallel!r} be 1 or more")
    headers = None
    if api_key_env is not None:
        if api_key_env not in os.environ:
            raise ValueError(f"api_key_env={api_key_env!r}: there is no such environment variable")
        headers = {"authorization": f"Bearer {os.environ[api_key_env]}"}
    endpoint = Endpoint(url, seconds, retries, headers)

    async def score(view: View) -> float | Missing:
        body = {"model": model, "messages": messages_of(view, rubric, low, high), "max_tokens": max_tokens}
        try:
            answer = json_of(await endpoint.post("/chat/completions", json={**body, "temperature": 0, **(extra or {})}))
        except EndpointError as error:
            return Missing(error.cause, str(error))
        try:
            said = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return Missing(Cause.WRONG_TYPE, f"{url} gave no chat completion: {str(answer)[:100]}")
        value = read_score(said, low, high) if isinstance(said, str) else None
        if value is None:
            return Missing(Cause.WRONG_TYPE, f"the judge gave no score from {low:g} to {high:g}: {str(said)[-150:]!r}")
        return (value - low) / (high - low)

    async def judge(segments: Sequence[View]) -> Values:
        gate = asyncio.Semaphore(parallel)

        async def one(view: View) -> float | Missing:
            async with gate:
                try:
                    return await score(view)
                except Exception as error:  # a picture or text that cannot be encoded
                    return raised(error)

        return list(await asyncio.gather(*map(one, segments)))

    return reward(judge, **options)
