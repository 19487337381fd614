"""GRPO on interleaved rollouts: sample, reward, route, then μ passes of score, loss, step.

Deviations from the papers, and simplifications:
- A token's advantage is that of its segment (`RewardRouter`); text and image tokens are averaged on their own and then
  weighted, so that many image tokens do not drown few text tokens.
- With μ = 1 the old policy is the new one, detached; no second forward pass is made.
- Micro-batches hold rollouts of like length. Losses are sums over the step's global denominators, so how a step is cut
  into micro-batches and processes changes nothing but speed.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from unidiff import estimators, noise
from unidiff.grpo.checkpoint import RunFolder
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.experience import Experience, segment_views, spread
from unidiff.grpo.losses import Denominators, LossStats, modality_loss
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import Reward, as_rewards
from unidiff.rewards.router import Routed, RewardRouter
from unidiff.rewards.table import RewardTable, evaluate
from unidiff.sampling.compute import Compute
from unidiff.sampling.rollout import InterleavedSampler, Rollout
from unidiff.sequence import Modality
from unidiff.tasks import Task

_PROMPT = 1 << 21  # noise stream of the choice of training prompts
_TRAIN_PROMPTS = 1 << 30


class GRPOTrainer:
    """Trains `model` on `task` with `rewards` (default: the task's own).

    on_step(step, metrics, experience): called after each step, on the main process, with its own share of the
    rollouts. router: instead of the one that the config names. Raises ValueError for settings that do not fit.
    """

    def __init__(
        self,
        model: UnifiedModel,
        task: Task,
        config: GRPOConfig,
        rewards: Sequence[Reward | str | Callable[..., Any]] | None = None,
        *,
        router: RewardRouter | None = None,
        accelerator: Accelerator | None = None,
        on_step: Callable[[int, dict[str, float], Experience], None] | None = None,
    ) -> None:
        self.config, self.task, self.on_step = config, task, on_step
        self.accelerator = accelerator or Accelerator(log_with=config.tracker, project_dir=config.output_dir)
        processes = self.accelerator.num_processes
        if config.num_prompts % processes:
            raise ValueError(f"num_prompts is {config.num_prompts}; it must be a multiple of the {processes} processes")
        self.rewards = as_rewards(task.rewards() if rewards is None else rewards)
        self.router = router or RewardRouter(
            assignment=config.assignment, scale=config.scale_rewards, leave_one_out=config.leave_one_out
        )
        self.text_estimator = _estimator(config.text_estimator, config.text_min_ratio)
        self.image_estimator = _estimator(config.image_estimator, config.image_min_ratio)
        self.model = model.to(self.accelerator.device).eval()  # dropout never runs: old and new policy must agree
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if config.beta else None
        self.sampler = InterleavedSampler(self.model, config.sampler(), task.region)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.policy, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.folder = RunFolder(config.output_dir)
        self.stopped = False

    def _lr_factor(self, step: int) -> float:
        warm = min((step + 1) / max(self.config.warmup_steps, 1), 1.0)
        if self.config.lr_schedule == "constant":
            return warm
        return warm * max(1 - step / max(self.config.max_steps, 1), 0.0)

    # ---------------------------------------------------------------- the loop

    def train(self) -> list[dict[str, float]]:
        """Runs up to max_steps steps and returns their metrics. SIGINT or SIGTERM ends the run after the step in
        progress, with a checkpoint; `stopped` then says so."""
        config, start, history = self.config, 0, []
        if self.accelerator.is_main_process:
            self.folder.open(config)
        self.accelerator.wait_for_everyone()
        if config.resume:
            start = self.folder.load(self.accelerator)
        if self.accelerator.is_main_process:
            history = self.folder.rewind(start)
        if config.tracker:
            self.accelerator.init_trackers("unidiff", config=_flat(config.to_dict()))
        with self._stop_signals() as asked:
            for step in range(start, config.max_steps):
                metrics, experience = self.step(step)
                if self.accelerator.is_main_process:
                    history.append(metrics)
                    self.folder.append(metrics)
                    if self.on_step is not None:
                        self.on_step(step, metrics, experience)
                if config.tracker:
                    self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
                self.stopped = self._any_process(bool(asked))
                last = step + 1 == config.max_steps
                if self.stopped or last or (config.save_steps and (step + 1) % config.save_steps == 0):
                    self.folder.save(self.accelerator, step + 1)
                if self.stopped:
                    break
        if config.tracker:
            self.accelerator.end_training()
        return history

    def step(self, step: int) -> tuple[dict[str, float], Experience]:
        """One step: experience, then the update. Returns its metrics (equal on every process) and experience."""
        clock = {"start": time.perf_counter()}
        rollouts, rows, examples = self._rollouts(step, clock)
        table, routed, everything = self._rewards(rows, clock)
        experience = self._experience(step, rollouts, rows, examples, table, routed)
        clock["route"] = time.perf_counter()
        metrics = {"step": step, **self._update(step, experience)}
        clock["update"] = time.perf_counter()
        metrics |= everything | self._held(rollouts, rows, examples)
        names, times = list(clock), list(clock.values())
        metrics |= {f"seconds/{n}": b - a for n, a, b in zip(names[1:], times, times[1:])}
        metrics["seconds"] = times[-1] - times[0]
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}, experience

    # ---------------------------------------------------------------- experience

    def _rollouts(self, step: int, clock: dict[str, float]) -> tuple[list[Rollout], list[Any], list[Any]]:
        config = self.config
        share = config.num_prompts // self.accelerator.num_processes
        mine = range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        indices = [prompt_index(config.seed, step, p) for p in mine]
        prompts = [self.task.example("train", i) for i in indices]
        keys = [noise.key(config.seed, step, p, g) for p in mine for g in range(config.num_generations)]
        rollouts = self.sampler.sample([self.model.encode(e.prompt) for e in prompts], keys)
        clock["rollout"] = time.perf_counter()
        examples = [e for e in prompts for _ in range(config.num_generations)]
        rows = segment_views(self.model, rollouts, examples)
        clock["decode"] = time.perf_counter()
        return rollouts, rows, examples

    def _rewards(self, rows: list[Any], clock: dict[str, float]) -> tuple[RewardTable, Routed, dict[str, float]]:
        """This process's rewards; they are routed together with everybody's, since a batch may share statistics."""
        own = evaluate(self.rewards, rows)
        clock["reward"] = time.perf_counter()
        tables = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        table = RewardTable.concatenate(tables)
        groups = torch.arange(len(table.values_BSF)) // self.config.num_generations
        routed = self.router.route(table, groups)
        first = sum(len(t.values_BSF) for t in tables[: self.accelerator.process_index])
        mine = slice(first, first + len(own.values_BSF))
        return own, Routed(routed.advantage_BS[mine], routed.valid_BS[mine], routed.metrics), routed.metrics

    def _experience(
        self,
        step: int,
        rollouts: list[Rollout],
        rows: list[Any],
        examples: list[Any],
        table: RewardTable,
        routed: Routed,
    ) -> Experience:
        canvas = self.model.render([r.sequence for r in rollouts])
        keys = torch.tensor([noise.key(r.key, step) for r in rollouts], device=canvas.ids.device)
        views = estimators.draw_views(
            canvas, self.text_estimator, self.image_estimator, self.config.num_iterations, keys
        )
        advantage = spread(routed.advantage_BS, canvas, rollouts)
        trained = spread(routed.valid_BS.float(), canvas, rollouts) > 0
        return Experience(rollouts, rows, examples, table, routed, canvas, views, advantage, trained)

    # ---------------------------------------------------------------- the update

    def _update(self, step: int, experience: Experience) -> dict[str, float]:
        batches = experience.micro_batches(self.config.micro_batch_size)
        old = self._old_log_probs(experience, batches)
        total: dict[Modality, LossStats] = {}
        first: dict[str, float] = {}
        norms = []
        for iteration in range(self.config.num_iterations):
            stats = self._pass(experience, iteration, batches, old)
            if iteration == 0:
                first = self._first_ratio(step, experience, batches, stats)
            total = {m: total[m] + s if m in total else s for m, s in stats.items()}
            norms.append(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        metrics = {"lr": self.scheduler.get_last_lr()[0], "grad_norm": float(torch.stack(norms).mean()), **first}
        self.scheduler.step()
        for modality, stats in total.items():
            name = modality.name.lower()
            values = self._reduced(stats).means()
            metrics |= {f"{k}/{name}": values[k] for k in ("clip_low", "clip_high", "tokens") if k in values}
            metrics[f"kl/{name}"] = values["kl_ref" if self.config.beta else "kl_old"]
        return metrics

    def _pass(
        self, experience: Experience, iteration: int, batches: list[Tensor], old: list[list[Tensor]] | None
    ) -> dict[Modality, LossStats]:
        """Gradients of one inner iteration, accumulated over micro-batches."""
        config, processes = self.config, self.accelerator.num_processes
        weight = experience.weight_BL(iteration)
        denominators = self._denominators(weight, experience)
        total: dict[Modality, LossStats] = {}
        for at, rows in enumerate(batches):
            sync = contextlib.nullcontext() if at + 1 == len(batches) else self.accelerator.no_sync(self.policy)
            with sync:
                new = self._score(self.policy, experience, iteration, rows)
                reference = None
                if self.reference is not None:
                    with torch.no_grad():
                        reference = self._score(self.reference, experience, iteration, rows)
                loss, stats = modality_loss(
                    new,
                    new.detach() if old is None else old[iteration][at],
                    experience.advantage_BL[rows],
                    weight[rows],
                    experience.canvas.modality[rows],
                    loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
                    denominators=denominators,
                    weights={Modality.TEXT: config.text_weight, Modality.IMAGE: config.image_weight},
                    level="sequence" if config.loss_type == "gspo" else "token",
                    epsilon_low=config.epsilon,
                    epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
                    delta=config.delta,
                    beta=config.beta,
                    logp_ref_BL=reference,
                )
                self.accelerator.backward(loss * processes)  # gradients are averaged over processes, sums are meant
            total = {m: total[m] + s if m in total else s for m, s in stats.items()}
        return total

    def _score(self, model: Any, experience: Experience, iteration: int, rows: Tensor) -> Tensor:
        view = experience.views[iteration]
        hide = None if view.hide is None else view.hide[rows]
        temperature = (self.config.text_temperature, self.config.image_temperature)
        return model(experience.canvas.rows(rows), view.mask[rows], hide, temperature)

    def _old_log_probs(self, experience: Experience, batches: list[Tensor]) -> list[list[Tensor]] | None:
        """Log-probabilities of every iteration's view before the first update; None if there is only one."""
        if self.config.num_iterations == 1:
            return None
        with torch.no_grad():
            return [
                [self._score(self.model, experience, iteration, rows) for rows in batches]
                for iteration in range(self.config.num_iterations)
            ]

    def _first_ratio(
        self, step: int, experience: Experience, batches: list[Tensor], stats: dict[Modality, LossStats]
    ) -> dict[str, float]:
        """Largest |ρ − 1| at the first inner iteration, where the policy has not changed: what is not float noise is a
        bug. With one iteration ρ is 1 by construction, so now and then some rows are scored again in other company."""
        every = self.config.check_ratio_every
        if self.config.num_iterations > 1:
            peak = max((float(s.peak) for s in stats.values()), default=0.0)
        elif every and step % every == 0:
            rows = batches[0][:4]
            with torch.no_grad():
                alone = self._score(self.model, experience, 0, rows)
                among = self._score(self.model, experience, 0, batches[0])[: len(rows)]
            peak = float((alone - among).exp().sub(1).abs().max())
        else:
            return {}
        return {"ratio_first_iteration_max_dev": self._reduce_max(peak)}

    def _denominators(self, weight: Tensor, experience: Experience) -> dict[Modality, Denominators]:
        """Of the whole step, over all processes."""
        longest = float(self.model.spec.text_length * (self.config.max_rounds + 1))
        pixels = self.model.spec.image_grid[0] * self.model.spec.image_grid[1] * self.config.max_rounds
        out = {}
        for modality, length in ((Modality.TEXT, longest), (Modality.IMAGE, float(pixels))):
            own = Denominators.of(weight * (experience.canvas.modality == modality), length)
            sums = self.accelerator.reduce(own.tensor().to(weight.device), "sum")
            out[modality] = Denominators.from_tensor(sums, length)  # type: ignore[arg-type]
        return out

    # ---------------------------------------------------------------- metrics

    def _held(self, rollouts: list[Rollout], rows: list[Any], examples: list[Any]) -> dict[str, float]:
        """The task's figures of the step's rollouts, why they stopped, and their mean cost; over all processes."""
        figures = self.task.measure(rows, examples)
        cost = sum((r.compute for r in rollouts), Compute())
        sums: dict[str, tuple[float, int]] = {}
        for name, values in figures.items():
            kept = values[values == values]
            sums[name] = (float(kept.sum()), len(kept))
        for rollout in rollouts:
            name = f"stop/{rollout.stop.name.lower()}"
            sums[name] = (sums.get(name, (0.0, 0))[0] + 1, len(rollouts))
        for phase, c in (*cost.items(), ("total", cost.total)):
            for kind, value in c.to_dict().items():
                if kind in ("token_forwards", "flops") or phase == "total":
                    sums[f"compute/{phase}/{kind}"] = (value, len(rollouts))
        everybody = gather_object([sums]) if self.accelerator.num_processes > 1 else [sums]
        total = sum(len(rollouts) for _ in everybody)
        out = {}
        for name in {n: None for one in everybody for n in one}:
            parts = [one.get(name, (0.0, 0)) for one in everybody]
            count = total if name.startswith("stop/") else sum(n for _, n in parts)
            out[name] = sum(v for v, _ in parts) / max(count, 1)
        return out

    def _reduced(self, stats: LossStats) -> LossStats:
        if self.accelerator.num_processes == 1:
            return stats
        sums = self.accelerator.reduce(stats.sums_K.to(self.accelerator.device), "sum")
        return LossStats(sums, torch.tensor(self._reduce_max(float(stats.peak))))  # type: ignore[arg-type]

    def _reduce_max(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).max())  # type: ignore[union-attr]

    def _any_process(self, flag: bool) -> bool:
        return self._reduce_max(float(flag)) > 0

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[list[int]]:
        """Collects SIGINT and SIGTERM; a second one acts as usual."""
        asked: list[int] = []

        def ask(number: int, _: FrameType | None) -> None:
            asked.append(number)
            signal.signal(number, previous[number])

        try:
            previous = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's business
            yield asked
            return
        try:
            yield asked
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def prompt_index(seed: int, step: int, prompt: int) -> int:
    """Index in the train split of a step's prompt."""
    return int(noise.uniform(noise.keys(seed, step, prompt), (_PROMPT,), 1) * _TRAIN_PROMPTS)


def _estimator(name: str, min_ratio: float) -> estimators.Estimator:
    cls = estimators.ESTIMATORS[name]
    has_ladder = "min_ratio" in getattr(cls, "__dataclass_fields__", {})
    return estimators.make(name, **({"min_ratio": min_ratio} if has_ladder else {}))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as hyper-parameters."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
