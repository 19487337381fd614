"""Samples rollouts, or opens those that a run saved, and shows every edit on a page.

    python tools/edit_rollout.py                                    # the shipped model on a few held-out boards
    python tools/edit_rollout.py --checkpoint outputs/run --image board.png --prompt "find the goal" --box 2,1,3,3
    python tools/edit_rollout.py --rollouts outputs/run/rollouts/step-000040.safetensors --sample 3
    python tools/edit_rollout.py --compare region,confidence,random,full --index 0
    python tools/edit_rollout.py --checkpoint recipes/base_tasks --task edit_shapes --edit confidence
    python tools/edit_rollout.py --checkpoint outputs/mine --task my_tasks.py:puzzle

OUTPUT gets page.html, one file that needs nothing else, and with --png, --gif and --json strips, animations and data.
docs/inspect.md says how to read the page.
"""

from __future__ import annotations

import json
import os
import sys
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from unidiff import InterleavedSampler, SamplerConfig, UnifiedModel, noise
from unidiff.command_line import parse
from unidiff.config import FilePath, build, setting
from unidiff.files import write_json
from unidiff.grpo.experience import segment_views
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, load_rollouts, router_settings
from unidiff.images import to_pil
from unidiff.images.picture import rgb
from unidiff.program import run_program
from unidiff.report.gallery import mixed_first, mixed_groups, records, successes
from unidiff.report.page import Comparison, write_page
from unidiff.report.record import RolloutRecord
from unidiff.report.strips import write_animation, write_strips
from unidiff.rewards.names import REWARDS, as_rewards
from unidiff.rewards.reward import Reward, RewardError
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.segment_view import SegmentView
from unidiff.rewards.table import reward_table
from unidiff.sampling.edit import EDITS, Locate, box
from unidiff.scorers.pictures import pixels_of, psnr
from unidiff.tasks import Example, Task, resolve
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.frozen_lake.task import QUESTION

BASE = Path(__file__).resolve().parent.parent / "recipes" / "base"
SHOWN = 16  # default number of a file's rollouts on one page (see --sample)
PROMPTS, LOOKED_AT = 3, 24  # default numbers of prompts to show and to try (see --index)


@dataclass(frozen=True)
class Config:
    """The settings: what to show, what to sample, and what to write."""

    checkpoint: FilePath | None = setting(
        "", None, "checkpoint folder, run folder (its model and settings) or hub name; none = the shipped model"
    )
    trust_run: bool = setting(
        "", False, "import the task and the rewards that a run folder names by file or module, which runs their code"
    )
    rollouts: FilePath | None = setting("", None, "a file that a run saved, to look at instead of sampling")
    sample: tuple[int, ...] | None = setting(
        "", None, "which rollouts, from 0, with commas; none = all, of a file 16, groups with both outcomes first"
    )

    task: str | None = setting(
        "", None, "a name, data.jsonl, file.py:name or package.module:name (docs/tasks.md); none = the run's"
    )
    task_options: dict[str, Any] = setting("", dict, "settings of the task, each as --task.NAME VALUE")
    index: tuple[int, ...] | None = setting(
        "", None, "prompts of the split, with commas; none = three of the first 24, one with both outcomes among them"
    )
    split: str = setting("", "test", "of the task")
    image: FilePath | None = setting("", None, "your own picture instead of a task's; prepared as the family does")
    prompt: str | None = setting("", None, "your own text, with or without a picture")
    num_generations: int = setting("", 4, "rollouts of each prompt; advantages need 2")
    edit: Literal["region", "confidence", "random", "full"] | None = setting(
        "", None, "which tokens are denoised again; none = the run's, or region"
    )
    box: tuple[int, int, int, int] | None = setting(
        "",
        None,
        "TOP,LEFT,BOTTOM,RIGHT in rows and columns of tokens, ends exclusive: edit here, whatever the text names",
    )
    compare: tuple[str, ...] | None = setting(
        "", None, "several edits with commas: the same prompt and noise under each, in columns"
    )
    sampler: dict[str, str] = setting("", dict, "other settings of rollouts, as in image_steps=16,greedy=true")
    rewards: tuple[str, ...] | None = setting("", None, "package.module:function, ...; none = the run's, or the task's")
    seed: int = setting("", 0, "of the noise")

    output: FilePath = setting("", "outputs/edits", "folder of the page")
    png: bool = setting("", False, "also a strip of before, mask and after for each edit")
    gif: bool = setting("", False, "also the denoising of each rollout")
    json: bool = setting("", False, "also everything as data")
    no_open: bool = setting("", False, "do not open the page in a browser")

    def __post_init__(self) -> None:
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}; it must be at least 1")
        if self.index == ():
            raise ValueError("index is empty; name at least one prompt of the task")
        if self.compare is not None:
            unknown = [name for name in self.compare if name not in EDITS]
            if unknown or len(set(self.compare)) < len(self.compare) or not self.compare:
                raise ValueError(f"compare is {','.join(self.compare)!r}; name some of {','.join(EDITS)}, each once")
        if self.box is not None and self.edit not in (None, "region"):
            raise ValueError(f"box says what to edit, and so does edit={self.edit}; give one of them")
        sampling = {"task", "image", "prompt", "box", "edit", "compare"}
        if self.rollouts and (given := sorted(n for n in sampling if getattr(self, n) is not None)):
            raise ValueError(f"rollouts opens a file, {' and '.join(given)} would sample anew; give one of them")


Sampled = tuple[RolloutBatch, list[tuple[SegmentView, ...]]]  # rollouts, and their decoded views


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the tool; returns the page's path."""
    sys.path.append(os.getcwd())  # for a user's own rewards
    config = parse(Config, argv, __doc__ or "")
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: output: {config.output} cannot be written ({error})") from error
    try:
        shown = opened(config) if config.rollouts else sampled(config)
    except (ValueError, FileNotFoundError, ImportError, RewardError) as error:
        raise SystemExit(f"error: {error}") from error
    try:
        page = shown.write(config)
    except OSError as error:
        raise SystemExit(f"error: output: {config.output} cannot be written ({error})") from error
    print(f"look at {page}")
    if not config.no_open:
        webbrowser.open(page.resolve().as_uri())
    return page


# ---------------------------------------------------------------- what is shown


@dataclass
class Shown:
    """Records by gallery, comparisons, and the facts at the top of the page."""

    title: str
    facts: dict[str, Any]
    galleries: dict[str, list[RolloutRecord]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def named(self) -> list[tuple[str, RolloutRecord]]:
        """(stem of the file names, record) for every record."""
        listed = [r for group in self.galleries.values() for r in group]
        listed += [r for compared in self.comparisons for r in compared.records.values()]
        return [(f"rollout-{i:02d}", r) for i, r in enumerate(listed)]

    def write(self, config: Config) -> Path:
        out = Path(config.output)
        for name, record in self.named:
            if config.png:
                write_strips(out / "strips", name, record)
            if config.gif:
                write_animation(out / "animations" / f"{name}.gif", record)
        page = write_page(
            out / "page.html",
            title=self.title,
            summary=self.facts,
            galleries=self.galleries,
            comparisons=self.comparisons,
            open=True,
        )
        if config.json:
            write_json(out / "rollouts.json", self.data())
        return page

    def data(self) -> dict[str, Any]:
        """All content of the page, as JSON data."""
        return {
            "title": self.title,
            "facts": self.facts,
            "galleries": {name: [r.to_dict() for r in group] for name, group in self.galleries.items()},
            "comparisons": [
                {"title": c.title, "rollouts": {name: r.to_dict() for name, r in c.records.items()}}
                for c in self.comparisons
            ],
        }


def opened(config: Config) -> Shown:
    """Opens rollouts that a run saved."""
    path = Path(config.rollouts or "")
    batch = load_rollouts(path)
    model = decoder(config, path, batch)
    rows = mixed_first(batch)[:SHOWN] if config.sample is None else list(config.sample)
    made = dict(zip(rows, records(model, batch, rows)))
    galleries: dict[str, list[RolloutRecord]] = {}
    for row, one in made.items():
        galleries.setdefault(one.title, []).append(replace(one, title=f"sample {row}"))
    facts = {"file": path.name, "step": batch.step, "rollouts": f"{len(rows)} of {len(batch)}"} | batch.router
    return Shown(f"unidiff · {path.parent.parent.name or path.stem}, {path.stem}", facts, galleries)


def decoder(config: Config, path: Path, batch: RolloutBatch) -> UnifiedModel:
    """The model that decodes a file: the given checkpoint, else the run's model, else the run's initial model, else the
    shipped one. Raises ValueError if none fits.

    The path of the run's initial model may be relative to the folder where the run was started, which is one of the
    folders above it.
    """
    if config.checkpoint:
        return UnifiedModel.from_pretrained(model_path(config.checkpoint))
    run, began = path.resolve().parent.parent, batch.config.get("model")
    for folder in (run / "model", *(above / str(began) for above in (Path(), *run.parents) if began)):
        if (folder / "config.json").is_file():
            return UnifiedModel.from_pretrained(str(folder))
    model = UnifiedModel.from_pretrained(str(BASE))
    try:
        batch.check(model)
    except ValueError as error:
        where = f"; its run began with {began!r}, which is not here" if began else ""
        raise ValueError(f"checkpoint: name one that {path} fits{where}. With the shipped model {error}") from error
    return model


def sampled(config: Config) -> Shown:
    """Samples new rollouts of a model. Settings are checked as far as possible before the model is loaded."""
    run = run_settings(config.checkpoint)
    task = task_of(config, run)
    rewards_of(config, run, task)
    sampler_settings(config, {}, run)
    picture = own_picture(config)
    model = UnifiedModel.from_pretrained(model_path(config.checkpoint))
    task = task.fitted(model)
    settings = sampler_settings(config, model.spec.sampler, run)
    locate = task.region if config.box is None else box(*config.box)
    name = Path(config.checkpoint).name if config.checkpoint else "the shipped model"
    facts = {"checkpoint": config.checkpoint or "recipes/base", "seed": config.seed}
    facts |= {"edit": ", ".join(config.compare or (settings.edit,))}
    facts |= {"task": config.task} if config.task else {}
    facts |= {"box": ", ".join(map(str, config.box))} if config.box else {}
    shown = Shown(f"unidiff · {name}, edit by edit", facts)
    own = own_prompt(config, model, picture, facts) if config.image or config.prompt else None

    def drawn(prompts: list[Example], edit: str, each: int) -> Sampled:
        return sample(model, task, prompts, replace(settings, edit=edit), locate, each, config, run)  # type: ignore[arg-type]

    if config.compare:
        prompts = own or task_prompts(config, task, config.index or range(PROMPTS))
        made = {}
        for edit in config.compare:
            batch, views = drawn(prompts, edit, 1)
            made[edit] = records(model, batch, views=views)
        for i in config.sample or range(len(prompts)):
            check_sample(i, len(prompts))
            shown.comparisons.append(Comparison(prompts[i].title, {edit: made[edit][i] for edit in made}))
        return shown
    each = config.num_generations
    if own or config.index or config.sample or each == 1:
        prompts = own or task_prompts(config, task, config.index or range(PROMPTS))
        batch, views = drawn(prompts, settings.edit, each)
    else:
        batch, views = both_outcomes(lambda index: drawn(task_prompts(config, task, index), settings.edit, each))
    rows = config.sample or (range(len(batch)) if config.index else mixed_first(batch))
    for row, one in zip(rows, records(model, batch, rows, views=views)):
        shown.galleries.setdefault(batch.titles[row], []).append(replace(one, title=f"sample {row}"))
    return shown


def both_outcomes(drawn: Callable[[Sequence[int]], Sampled]) -> Sampled:
    """Rollouts of the first prompts that include a group with both successes and failures. If none of the first
    `LOOKED_AT` prompts does, or if success is unknown, rollouts of the very first prompts."""
    first = None
    for start in range(0, LOOKED_AT, PROMPTS):
        one = drawn(range(start, start + PROMPTS))
        first = first or one
        if mixed_groups(one[0]) or not any(outcome is not None for outcome in successes(one[0])):
            return one
    assert first is not None
    print(f"none of the first {LOOKED_AT} prompts has both successes and failures; these are the first {PROMPTS}")
    return first


def check_sample(i: int, count: int) -> None:
    if not 0 <= i < count:
        raise ValueError(f"sample {i} does not exist: there are {count} rollouts, counted from 0")


def sample(
    model: UnifiedModel,
    task: Task,
    prompts: list[Example],
    settings: SamplerConfig,
    locate: Locate,
    each: int,
    config: Config,
    run: dict[str, Any],
) -> Sampled:
    """Samples `each` rollouts of every prompt, with a trace. Rewards and advantages are added for a task's prompts."""
    keys = [noise.key(config.seed, p, g) for p in range(len(prompts)) for g in range(each)]
    own = config.image or config.prompt
    prompts = [p if own else ready(model, task, p) for p in prompts]
    sampler = InterleavedSampler(model, settings, locate, trace=True)
    rollouts = sampler.sample([encoded(model, task, p, settings, config) for p in prompts], keys)
    repeated = [p for p in prompts for _ in range(each)]
    views = segment_views(model, rollouts, repeated)
    groups = torch.arange(len(rollouts)) // each
    batch = RolloutBatch(rollouts, [p.title for p in repeated], groups, fingerprint(model))
    if not own:
        batch.figures = {name: values.tolist() for name, values in task.measure(views, repeated).items()}
        batch.table = reward_table(rewards_of(config, run, task), views)
        router = RewardRouter(**{k: run[k] for k in ("assignment", "leave_one_out") if k in run})
        if each > 1:
            router = replace(router, scale=run.get("scale_rewards", router.scale))
            batch.routed, batch.router = router.route(batch.table, groups), router_settings(router)
    return batch, views


def encoded(model: UnifiedModel, task: Task, prompt: Example, settings: SamplerConfig, config: Config) -> Any:
    """The encoded prompt. A box replaces the task's own `locate`."""
    if config.image or config.prompt:
        parts: Any = prompt.prompt
        return model.encode_prompt(parts, settings.guides, task.writes, system=task.system, room=task.room)
    made = encode(model, task, prompt, settings.guides)
    return made if config.box is None else replace(made, locate=None)


# ---------------------------------------------------------------- settings


def task_of(config: Config, run: dict[str, Any]) -> Task:
    """The named task, or the run's. Raises ValueError if it cannot be made, or if a run's settings would import it
    without --trust_run."""
    name = config.task or run.get("task") or "frozen_lake"
    options = config.task_options if config.task else dict(run.get("task_options") or {})
    if not config.task and name == "frozen_lake":
        given = {"size": run.get("board_size", 4), "pictures": run.get("pictures", True)}
        options = given | options
    if not config.task and ":" in name and not config.trust_run:
        raise ValueError(
            f"checkpoint: the settings of {config.checkpoint} name the task {name}, which would be imported and run. "
            "Give --trust_run if you trust it, or name another one by --task"
        )
    try:
        task = resolve(name, options)
        task.check()
        return task
    except (TypeError, ValueError) as error:
        raise ValueError(f"task: {error}") from error


def rewards_of(config: Config, run: dict[str, Any], task: Task) -> list[Reward]:
    """The rewards of the command line, else of the run, else of the task. Raises ValueError if one is not a reward, or
    if a run's settings would import one without --trust_run."""
    shipped = as_rewards(task.rewards())
    own = {reward.name for reward in shipped}
    foreign = [name for name in run.get("rewards") or () if str(name).partition("=")[0].strip() not in {*REWARDS, *own}]
    if foreign and not config.rewards and not config.trust_run:
        raise ValueError(
            f"checkpoint: the settings of {config.checkpoint} name rewards that would be imported, which runs their "
            f"code: {', '.join(map(str, foreign))}. Give --trust_run if you trust them, or name others by --rewards"
        )
    try:
        return as_rewards(config.rewards or run.get("rewards") or shipped, shipped)
    except TypeError as error:
        raise ValueError(f"rewards: {error}") from error


def model_path(checkpoint: str | None) -> str:
    """The model of a run folder, or the given path itself. Raises FileNotFoundError for a run without a model."""
    if checkpoint is None:
        return str(BASE)
    folder = Path(checkpoint)
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"checkpoint: the run {folder} has no model/ yet; it is written when the run ends")
    return checkpoint


def run_settings(checkpoint: str | None) -> dict[str, Any]:
    """The settings of a run folder; {} for anything else."""
    path = Path(checkpoint or "") / "config.json"
    if not checkpoint or not (Path(checkpoint) / "metrics.jsonl").is_file() or not path.is_file():
        return {}
    return json.loads(path.read_text())


def sampler_settings(config: Config, family: Mapping[str, Any], run: dict[str, Any]) -> SamplerConfig:
    """The sampler's settings. Priority: command line, run, family, defaults."""
    names = {f.name for f in fields(SamplerConfig)}
    values = {k: v for k, v in {**family, **run}.items() if k in names} | config.sampler
    if config.edit or config.box:
        values["edit"] = config.edit or "region"
    return build(SamplerConfig, values)


def task_prompts(config: Config, task: Task, index: Sequence[int]) -> list[Example]:
    return [replace(task.example(config.split, i), title=f"{config.split} prompt {i}") for i in index]


def own_picture(config: Config) -> Image.Image | None:
    """The user's picture, or None. Raises ValueError or FileNotFoundError."""
    try:
        return rgb(config.image) if config.image else None
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"image: {error}") from error


def own_prompt(
    config: Config, model: UnifiedModel, picture: Image.Image | None, facts: dict[str, Any]
) -> list[Example]:
    """The user's text and picture, prepared by the family's rule. Prints the picture's prepared size, and the PSNR of
    its decoded tokens."""
    parts: list[Any] = [config.prompt or QUESTION]
    if picture is not None:
        shown = model.prepare(picture)
        (back,) = to_pil(model.decode_pixels(*model.encode_images([shown])[0])[None])
        sizes = [f"{image.width} × {image.height}" for image in (picture, shown)]
        facts["picture"] = f"{Path(config.image or '').name}: {sizes[0]} pixels, shown to the model at {sizes[1]}"
        facts["read back at"] = f"{psnr(pixels_of(shown), pixels_of(back)):.1f} dB (PSNR of what its tokens decode to)"
        print(f"{facts['picture']}; its tokens read back at {facts['read back at']}")
        parts.append(shown)
    return [Example(parts, title="your prompt")]


if __name__ == "__main__":
    run_program(main)
