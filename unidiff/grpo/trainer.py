"""GRPO on interleaved rollouts: sample, reward, route, then μ passes of score, loss, step.

Deviations from the papers, and simplifications:
- A token's advantage is that of its segment (`RewardRouter`); text and image tokens are averaged on their own and then
  weighted, so that many image tokens do not drown few text tokens.
- With μ = 1 the old policy is the new one, detached; no second forward pass is made.
- An estimator's several views share a forward pass, with fewer rollouts in it, so that memory does not grow with their
  number. Where those of one rollout do not fit they go part by part, and if a token's loss depends on several parts
  they go twice, first without a graph.
- Micro-batches hold rollouts of like length. Losses are sums over the step's global denominators, so how a step is cut
  into micro-batches and processes changes nothing but speed.
- Rollouts whose every advantage is 0 count in the denominators but are not run: without a KL term their gradient is 0.
- The learning rate is a function of the step, and so is all noise: a checkpoint is weights, optimizer state and step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState

from unidiff import estimators, noise
from unidiff.files import whole_folder
from unidiff.grpo import activations, checkpoint, lora, ratio, sharding
from unidiff.grpo.batches import MicroBatch
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.evaluation import Evaluation, evaluate, everybody, step_figures
from unidiff.grpo.experience import Experience, credited, guidance_of, prompt_index, sample_and_judge, spread
from unidiff.grpo.losses import LOSSES, Denominators, LossStats, added, check_finite, modality_loss
from unidiff.grpo.process import Clock, flat, stop_signals
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, router_settings, save_rollouts
from unidiff.guidance import Guidance
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import Reward, RewardError, as_rewards
from unidiff.rewards.routed import Routed
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.table import RewardTable, check_required
from unidiff.run_folder import RunFolder, step_of
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Canvas, Modality
from unidiff.tasks import Task


class GRPOTrainer:
    """Trains `model` on `task` with `rewards` (default: the task's own; else what `as_rewards` takes: marked functions,
    TRL-style ones, names, those of the task's own among them). Prompts are the task's train examples, of any
    index below 2**30.

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
        if config.rollout_parts > (share := config.num_prompts // processes):
            raise ValueError(f"rollout_parts is {config.rollout_parts}; a process has {share} prompts to part")
        own = task.rewards()
        self.rewards = as_rewards(own if rewards is None else rewards, own)
        if not self.rewards:
            raise ValueError("rewards is empty; give at least one reward function, or None for the task's own")
        self.router = router or RewardRouter(
            assignment=config.assignment, scale=config.scale_rewards, leave_one_out=config.leave_one_out
        )
        self.estimators = config.estimators()
        for module in (r.function for r in self.rewards if isinstance(r.function, nn.Module)):
            module.to(self.accelerator.device)
        sharding.check(self.accelerator)
        self.model = model.to(self.accelerator.device).eval()  # dropout never runs: old and new policy must agree
        if config.lora_rank:
            lora.add_adapters(self.model, config.lora_rank, config.lora_alpha, config.seed)
        if config.gradient_checkpointing:
            activations.enable(self.model)
        self.reference = lora.reference(self.model, fresh=config.lora_rank > 0) if config.beta else None
        self.shards = sharding.shards(self.model, self.accelerator, config.max_grad_norm)
        self.sampler = InterleavedSampler(self.model, config.sampler(), task.region)
        self.optimizer = torch.optim.AdamW(
            lora.trained(self.model),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.policy, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.shards.begin(self.policy)
        self.folder = RunFolder(config.output_dir)
        self.stopped = False
        self._claimed = False
        self._last: Path | None = None  # the checkpoint to go on from

    def learning_rate(self, step: int) -> float:
        """Of a step: a linear rise over warmup_steps, then constant or falling to 0 at max_steps."""
        config = self.config
        warm = min((step + 1) / max(config.warmup_steps, 1), 1.0)
        left = 1.0 if config.lr_schedule == "constant" else max(1 - step / max(config.max_steps, 1), 0.0)
        return config.learning_rate * warm * left

    # ---------------------------------------------------------------- the loop

    @property
    def start(self) -> int:
        """Steps that were done before this run began; known when the directory has been claimed."""
        return step_of(self._last)

    def claim(self) -> None:
        """Takes the output directory for this run, and finds the checkpoint that `train` will go on from. `train` does
        it unless it has been done. Raises ValueError if the directory cannot be taken."""
        if not self._claimed:
            self._last = checkpoint.claim(self.folder, self.accelerator, self.config)
            self._claimed = True

    def train(self) -> list[dict[str, float]]:
        """Runs up to max_steps steps and returns the metrics of all steps so far (on the main process).

        SIGINT or SIGTERM ends the run after the step in progress, with a checkpoint; `stopped` then says so.
        """
        config = self.config
        self.claim()
        if self._last is not None:
            with self.shards.apart():
                checkpoint.load(self.accelerator, self._last)
        history = self.folder.rewind(self.start) if self.accelerator.is_main_process else []
        if config.tracker:
            self.accelerator.init_trackers("unidiff", config=flat(config.to_dict()))
        with stop_signals() as asked:
            for step in range(self.start, config.max_steps):
                try:
                    metrics, experience = self.step(step)
                except RewardError:  # the weights are those before the step
                    self._checkpoint(step)
                    raise
                done, last = step + 1, step + 1 == config.max_steps
                if config.eval_steps and done % config.eval_steps == 0 and not last:
                    metrics |= {f"eval/{k}": v for k, v in self.held_out(("greedy",))["greedy"].figures.items()}
                if self.accelerator.is_main_process:
                    history.append(metrics)
                    self.folder.append(metrics)
                    if self.config.saves_rollouts(step):
                        save_rollouts(self.folder.rollouts(done), self.batch(step, experience))
                    if self.on_step is not None:
                        self.on_step(step, metrics, experience)
                if config.tracker:
                    self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
                self.stopped = self._largest(float(bool(asked))) > 0
                if self.stopped or last or (config.save_steps and done % config.save_steps == 0):
                    self._checkpoint(done)
                if self.stopped:
                    break
        return history

    def step(self, step: int) -> tuple[dict[str, float], Experience]:
        """One step: experience, then the update. Returns its metrics (equal on every process) and experience."""
        clock = Clock()
        rollouts, rows, examples, own = self._rollouts(step, clock)
        everything, routed = self._route(own)
        first = self.accelerator.process_index * len(rows)
        mine = slice(first, first + len(rows))
        experience = self._experience(step, rollouts, rows, examples, everything.rows(mine), routed.rows(mine))
        clock.lap("route")
        metrics = {"step": step, **self._update(step, experience)}
        clock.lap("update")
        metrics |= routed.metrics | step_figures(self.task, experience, self.accelerator)
        clock.lap("measure")
        metrics |= {f"seconds/{name}": value for name, value in clock.seconds.items()}
        metrics["seconds"] = sum(clock.seconds.values())
        metrics |= {k if k not in metrics else f"log/{k}": v for k, v in everything.metrics.items()}
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}, experience

    def _checkpoint(self, step: int) -> None:
        with self.shards.apart():
            checkpoint.save(self.folder, self.accelerator, step)

    def save_model(self, folder: str | Path) -> None:
        """Writes the trained model in its family's layout; adapters are merged into it, and also stand alone in the
        folder's `adapter`. Called by every process. Raises WriteError."""
        model = self.shards.whole(self.accelerator)
        if self.accelerator.is_main_process:
            with whole_folder(Path(folder)) as draft:
                with lora.merged(model):
                    model.save_pretrained(draft)
                if self.config.lora_rank:
                    lora.save_adapter(model, draft / "adapter")
        self.accelerator.wait_for_everyone()

    def batch(self, step: int, experience: Experience) -> RolloutBatch:
        """This process's rollouts of a step with what they earned, to be saved or looked at."""
        groups = experience.routed.group_B
        figures = self.task.measure(experience.rows, experience.examples)
        return RolloutBatch(
            rollouts=experience.rollouts,
            titles=[f"train prompt {prompt_index(self.config.seed, step, int(g))}" for g in groups],
            groups_B=groups,
            fits=fingerprint(self.model),
            figures={name: values.tolist() for name, values in figures.items()},
            table=experience.table,
            routed=experience.routed,
            router=router_settings(self.router),
            config=self.config.to_dict(),
            step=step + 1,
        )

    def held_out(self, ways: Sequence[str] = ("greedy", "sampled")) -> dict[str, Evaluation]:
        """Figures on eval_size prompts of eval_split, with the most probable values and with the sampler's own
        temperatures."""
        config = self.config
        return {
            way: evaluate(
                self.model,
                self.task,
                config.sampler(greedy=way == "greedy"),
                range(config.eval_size),
                split=config.eval_split,
                seed=config.seed,
                accelerator=self.accelerator,
                trace=way == "sampled",  # those that the report shows
            )
            for way in ways
        }

    # ---------------------------------------------------------------- experience

    def _rollouts(self, step: int, clock: Clock) -> tuple[list[Rollout], list[Any], list[Any], RewardTable]:
        """This process's rollouts, what rewards see of them, their examples, and what they earned."""
        config = self.config
        share = config.num_prompts // self.accelerator.num_processes
        mine = range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        indices = [prompt_index(config.seed, step, p) for p in mine]
        prompts = [self.task.example("train", i) for i in indices]
        keys = [noise.key(config.seed, step, p, g) for p in mine for g in range(config.num_generations)]
        self.sampler.trace = config.saves_rollouts(step)  # these are looked at; tokens do not depend on it
        encoded = [self.model.encode_prompt(e.prompt, config.guides) for e in prompts]
        state = TrainerState(global_step=step, max_steps=config.max_steps, epoch=0.0)
        rollouts, rows, table = sample_and_judge(
            self.sampler, encoded, prompts, keys, self.rewards, config.rollout_parts, clock, state
        )
        examples = [e for e in prompts for _ in range(config.num_generations)]
        return rollouts, rows, examples, table

    def _route(self, own: RewardTable) -> tuple[RewardTable, Routed]:
        """All processes' rewards, routed together: a batch may share statistics. Raises RewardError, on each of them,
        if a required reward lost a value on one."""
        table = RewardTable.concatenate(everybody(own, self.accelerator))
        check_required(self.rewards, table)
        return table, self.router.route(table, torch.arange(len(table.values_BSF)) // self.config.num_generations)

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
        draws = estimators.draw_views(canvas, *self.estimators, self.config.num_iterations, keys)
        advantage_BS = credited(routed, table.modality_BS, *self.estimators)
        advantage = spread(advantage_BS, canvas, rollouts)
        trained = spread(routed.valid_BS.float(), canvas, rollouts) > 0
        guidance = guidance_of(self.model, rollouts, self.config.scales if self.config.score_guidance else {})
        return Experience(rollouts, rows, examples, table, routed, canvas, draws, advantage, trained, guidance)

    # ---------------------------------------------------------------- the update

    def _update(self, step: int, experience: Experience) -> dict[str, float]:
        config = self.config
        sizes, everything = (config.micro_batch_size, self.model.spec.attention), self.reference is not None
        batches = [experience.micro_batches(*sizes, i, everything) for i in range(config.num_iterations)]
        old = self._old_log_probs(experience, batches)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: dict[Modality, LossStats] = {}
        first: dict[str, float] = {}
        norms = []
        for iteration in range(config.num_iterations):
            with self.shards.collected():
                stats = self._pass(experience, iteration, batches[iteration], None if old is None else old[iteration])
                if iteration == 0:
                    first = self._first_ratio(step, experience, batches[0], None if old is None else stats)
            total = added(total, stats)
            with self.shards.apart():
                norm: Any = self.accelerator.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
                norms.append(torch.as_tensor(norm))
                if self.accelerator.scaler is None:  # in float16 it leaves such a step out
                    check_finite(norms[-1], stats, f"step {step}, iteration {iteration}")
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        metrics = {"lr": rate, "grad_norm": float(torch.stack(norms).mean()), **first}
        for modality, stats in total.items():
            name = modality.name.lower()
            values = self._reduced(stats).means()
            metrics |= {f"{k}/{name}": values[k] for k in ("clip_low", "clip_high", "tokens")}
            metrics[f"kl/{name}"] = values["kl_old" if self.reference is None else "kl_ref"]
        return metrics

    def _pass(
        self, experience: Experience, iteration: int, batches: list[MicroBatch], old: list[Tensor] | None
    ) -> dict[Modality, LossStats]:
        """Gradients of one inner iteration, accumulated over micro-batches."""
        denominators = self._denominators(experience.weight_BL(iteration), experience)
        total: dict[Modality, LossStats] = {}
        for at, batch in enumerate(batches):
            before = None if old is None else old[at]
            reference = self._reference_log_probs(experience, iteration, batch)
            loss_of = functools.partial(self._loss, experience, iteration, batch, denominators, before, reference)
            total = added(total, self._backward(experience, iteration, batch, loss_of, last=at + 1 == len(batches)))
        return total

    def _loss(
        self,
        experience: Experience,
        iteration: int,
        batch: MicroBatch,
        denominators: dict[Modality, Denominators],
        old: Tensor | None,
        reference: Tensor | None,
        new: Tensor,
    ) -> tuple[Tensor, dict[Modality, LossStats]]:
        """A micro-batch's part of the step's loss. old: None = the new policy's values."""
        config, rows = self.config, batch.rows
        loss_type, level = LOSSES[config.loss_type]
        weight = experience.weight_BL(iteration)[rows]
        if reference is None:  # a row that runs only to synchronise processes is not counted
            weight = weight * experience.useful_B[rows, None]
        loss, stats = modality_loss(
            new,
            new.detach() if old is None else old,
            experience.advantage_BL[rows],
            weight,
            experience.canvas.modality[rows],
            loss_type=loss_type,
            denominators=denominators,
            weights={Modality.TEXT: config.text_weight, Modality.IMAGE: config.image_weight},
            without_ratio=[m for m, estimator in zip(Modality, self.estimators) if not estimator.ratio],
            level=level,
            epsilon_low=config.clip_range[0],
            epsilon_high=config.clip_range[1],
            delta=config.delta,
            beta=config.beta,
            logp_ref_BL=reference,
        )
        # Gradients are averaged over processes and divided by the steps of an accumulation that accelerate was told of;
        # sums are meant.
        return loss * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps, stats

    def _backward(
        self,
        experience: Experience,
        iteration: int,
        batch: MicroBatch,
        loss_of: Callable[[Tensor], tuple[Tensor, dict[Modality, LossStats]]],
        last: bool,
    ) -> dict[Modality, LossStats]:
        """Adds the gradients of a micro-batch. Processes are synchronised in the last backward pass of the last one.

        Views that do not fit into one pass go part by part. In each part's loss the log-probabilities of the others are
        numbers: found first, without a graph, if they have a say in what becomes of the part's.
        """
        if len(batch.passes) == 1:
            with self._gradients(last):
                loss, stats = loss_of(self._score(self.policy, experience, iteration, batch))
                self.shards.backward(loss)
            return stats
        level, stats = LOSSES[self.config.loss_type][1], {}
        if level == "token" and experience.scored_once(iteration, batch, *self.estimators):
            shape = batch.passes[-1].stop, len(batch.rows), experience.canvas.shape[1]
            logp_KBL = torch.zeros(shape, device=experience.canvas.ids.device)
        else:
            with torch.no_grad():
                logp_KBL = self._log_probs(self.policy, experience, iteration, batch)
        for k, part in enumerate(batch.passes):
            with self._gradients(last and k + 1 == len(batch.passes)):
                logp = self._log_probs(self.policy, experience, iteration, MicroBatch(batch.rows, [part]))
                logp_KBL = logp_KBL.detach().clone()
                logp_KBL[part] = logp
                loss, stats = loss_of(experience.values(logp_KBL, iteration, batch, *self.estimators))
                self.shards.backward(loss)
        return stats

    @contextlib.contextmanager
    def _gradients(self, synchronised: bool) -> Iterator[None]:
        """Around a forward and its backward pass. synchronised: it exchanges gradients with the other processes."""
        apart = contextlib.nullcontext() if synchronised else self.accelerator.no_sync(self.policy)
        with apart, activations.recomputed(self.model, self.config.gradient_checkpointing):
            yield

    def _score(self, model: Any, experience: Experience, iteration: int, batch: MicroBatch) -> Tensor:
        """Values [B, L] of a policy, as the estimators define them."""
        logp_KBL = self._log_probs(model, experience, iteration, batch)
        return experience.values(logp_KBL, iteration, batch, *self.estimators)

    def _log_probs(self, model: Any, experience: Experience, iteration: int, batch: MicroBatch) -> Tensor:
        """[K, B, L] of the views in the batch's passes."""
        canvas, views, guidance = experience.part(iteration, batch)
        return torch.cat([self._run(model, canvas, views[part], guidance) for part in batch.passes])

    def _run(self, model: Any, canvas: Canvas, views: list[estimators.View], guidance: Guidance | None) -> Tensor:
        temperature = (self.config.text_temperature, self.config.image_temperature)
        return estimators.run_views(model, canvas, views, temperature, guidance)

    @torch.no_grad()
    def _reference_log_probs(self, experience: Experience, iteration: int, batch: MicroBatch) -> Tensor | None:
        if self.reference is None:
            return None
        as_reference = lora.as_reference(self.reference, self.model)
        with self.accelerator.autocast(), as_reference as reference:  # in the precision of the prepared policy
            return self._score(reference, experience, iteration, batch)

    @torch.no_grad()
    def _old_log_probs(self, experience: Experience, batches: list[list[MicroBatch]]) -> list[list[Tensor]] | None:
        """Values of every iteration's draw before the first update; None if one, or if nothing trained has a ratio."""
        if self.config.num_iterations == 1:
            return None
        trained = self._denominators(experience.weight_BL(0), experience)
        if not any(e.ratio and trained[m].weight > 0 for m, e in zip(Modality, self.estimators)):
            return None
        return [[self._score(self.model, experience, i, batch) for batch in own] for i, own in enumerate(batches)]

    @torch.no_grad()
    def _first_ratio(
        self, step: int, experience: Experience, batches: list[MicroBatch], stats: dict[Modality, LossStats] | None
    ) -> dict[str, float]:
        """Largest |ρ − 1| at the first inner iteration, where the policy has not changed: what is not float noise is a
        bug. Of the new policy to the old one, unless there is none (stats None); and now and then of rows alone to the
        same rows in company."""
        config, score = self.config, functools.partial(self._score, self.model)
        gaps = [] if stats is None else [0.0, *(float(s.peak) for s in stats.values())]
        if config.check_ratio_every and step % config.check_ratio_every == 0:
            gaps.append(ratio.company_gap(score, experience, batches))
        if not gaps:
            return {}
        found = {"ratio_first_iteration_max_dev": self._largest(*gaps)}
        if config.scales and not config.score_guidance:
            guidance = guidance_of(self.model, experience.rollouts, config.scales)
            sizes = (config.num_generations, config.micro_batch_size, self.model.spec.attention)
            found["guidance_ratio_max_dev"] = self._largest(ratio.guidance_gap(score, experience, guidance, *sizes))
        return found

    def _denominators(self, weight: Tensor, experience: Experience) -> dict[Modality, Denominators]:
        """Of the whole step, over all processes."""
        spec, rounds = self.model.spec, self.config.max_rounds
        longest = {
            Modality.TEXT: float(spec.text_length * (rounds + 1)),
            Modality.IMAGE: float(spec.image_grid[0] * spec.image_grid[1] * rounds),
        }
        own = [Denominators.of(weight * (experience.canvas.modality == m), longest[m]).tensor() for m in longest]
        sums: Any = self.accelerator.reduce(torch.stack(own).to(weight.device), "sum")
        return {m: Denominators.from_tensor(sums[i], longest[m]) for i, m in enumerate(longest)}

    # ---------------------------------------------------------------- metrics

    def _reduced(self, stats: LossStats) -> LossStats:
        """Of all processes."""
        if self.accelerator.num_processes == 1:
            return stats
        sums: Any = self.accelerator.reduce(stats.sums_K, "sum")
        return LossStats(sums, torch.tensor(self._largest(float(stats.peak))))

    def _largest(self, *values: float) -> float:
        """Of the numbers that each process has; NaN if one is."""
        return float(torch.tensor(everybody(values, self.accelerator), dtype=torch.float64).max())
