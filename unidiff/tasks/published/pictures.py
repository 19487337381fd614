"""Prompts for pictures and instructions for edits, with scorers in this process and on servers."""

from __future__ import annotations

from typing import Any

from unidiff.rewards.reward import Reward
from unidiff.scorers.judge import judge
from unidiff.scorers.pictures import edit_locality
from unidiff.scorers.remote import pickled
from unidiff.scorers.vision import clip_score, hps_score, pick_score
from unidiff.tasks.rows import Rows

RUBRIC = (
    "The first picture was to be changed as the instruction says, and in nothing else. Judge the last picture: is what "
    "was asked for done, and is the rest as it was?"
)


def prompts(
    train: str,
    test: str | None = None,
    *,
    clip: str | None = "openai/clip-vit-large-patch14",
    pick: str | None = None,
    hps: str | None = None,
    image_reward: str | None = None,
    unified_reward: str | None = None,
    hpsv3: str | None = None,
    geneval: str | None = None,
    trust_pickle: bool = False,
) -> Rows:
    """Pictures from prompts: rows with a column prompt, such as GenEval's JSONL (tag, include, exclude, prompt).

    Every reward that is not None is used. In this process: clip and pick (checkpoints of CLIP and PickScore), hps and
    image_reward (the published files of HPSv2.1 and ImageReward). On MaskGRPO's servers: unified_reward, hpsv3, geneval
    (addresses such as "http://host:18088"). MaskGRPO divides UnifiedReward and HPSv3 by 5, and adds both to CLIP. Its
    servers answer with pickles, which trust_pickle must allow.
    """
    rewards: list[Reward] = []
    if clip is not None:
        rewards.append(clip_score(clip))
    if pick is not None:
        rewards.append(pick_score(pick))
    if hps is not None:
        rewards.append(hps_score(hps))
    if image_reward is not None:
        from unidiff.scorers import image_reward as module  # slow import: BERT and BLIP

        rewards.append(module.image_reward(image_reward))
    for name, url in (("unified_reward", unified_reward), ("hpsv3", hpsv3)):
        if url is not None:
            rewards.append(pickled(url, weight=0.2, name=name, trust_pickle=trust_pickle))
    if geneval is not None:
        strict = {"only_strict": True}
        rewards.append(pickled(geneval, column="asked", extra=strict, name="geneval", trust_pickle=trust_pickle))
    if not rewards:
        raise ValueError("prompts has no reward: give one of clip, pick, hps, image_reward, unified_reward, hpsv3, …")
    return Rows(
        train if test is None else {"train": train, "test": test},
        prompt="{prompt}",
        writes="image",
        columns={"asked": dict},
        rewards=rewards,
    )


def edits(
    train: str,
    test: str | None = None,
    *,
    judge_url: str | None = None,
    judge_model: str = "judge",
    api_key_env: str | None = None,
    locality: float = 0.5,
    box: str | None = None,
) -> Rows:
    """Edits: rows with the columns instruction and image. box: the column with the editable area (a box or a mask);
    None = chosen by confidence.

    Rewards: a judge on an OpenAI-style server, with `RUBRIC`, and edit locality with the weight `locality`.
    """
    rewards: list[Any] = []
    if judge_url is not None:
        rewards.append(judge(judge_url, judge_model, RUBRIC, on="image", api_key_env=api_key_env))
    if locality:
        rewards.append(edit_locality(weight=locality))
    if not rewards:
        raise ValueError("edits has no reward: give judge_url, or a locality above 0")
    return Rows(
        train if test is None else {"train": train, "test": test},
        prompt=["{instruction}", "{image}"],
        writes="edit",
        region=box,
        rewards=rewards,
    )
