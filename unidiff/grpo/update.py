"""PolicyUpdate: μ passes of score, loss and step over one step's rollouts.

- With μ = 1 the old policy is the new one, detached; there is no second forward pass.
- An estimator's views share a forward pass, which then has fewer rollouts, so that memory does not grow with the number
  of views. If one rollout's views do not fit, they run part by part. If a token's loss depends on several parts, each
  part runs twice, first without a graph.
- Micro-batches hold rollouts of similar length. Losses are sums divided by the step's global denominators, so cutting a
  step into micro-batches and processes changes only speed.
- Without a KL term, rollouts and segments without an advantage have gradient 0. They count in the denominators but do
  not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unidiff.estimators import Estimator, run_views, values_of
from unidiff.grpo import activations, balance, ratio
from unidiff.grpo.batches import MicroBatch
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.distributed import Whole
from unidiff.grpo.experience import Experience, guidance_of
from unidiff.grpo.losses import LOSSES, Denominators, LossStats, added, check_finite, modality_loss
from unidiff.grpo.process import largest
from unidiff.grpo.reference import Reference
from unidiff.model import UnifiedModel
from unidiff.sampling.plan import longest
from unidiff.sequence import Modality

Stats = dict[Modality, LossStats]


class PolicyUpdate:
    """Trains a policy on the experience of a step.

    model: the bare model. policy, optimizer: prepared by accelerate. reference: None = no KL term.
    """

    def __init__(
        self,
        model: UnifiedModel,
        policy: Any,
        optimizer: Any,
        reference: Reference | None,
        config: GRPOConfig,
        accelerator: Accelerator,
        weights: Whole,
    ) -> None:
        self.model, self.policy, self.optimizer, self.reference = model, policy, optimizer, reference
        self.config, self.accelerator, self.weights = config, accelerator, weights
        self.estimators: tuple[Estimator, Estimator] = config.estimators()  # of texts and of images

    def run(self, step: int, experience: Experience) -> dict[str, float]:
        """Trains on the experience of a step, counted from 0. Returns metrics, equal on every process. Raises
        FloatingPointError before the optimizer's step if the loss or the gradients are not finite."""
        config = self.config
        old = self.old_values(experience)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: Stats = {}
        first: dict[str, float] = {}
        norms = []
        for iteration in range(config.num_iterations):
            with self.weights.collected():
                batches = self.batches(experience, iteration)
                if old is not None:
                    batches = [dataclasses.replace(b, old_RL=v) for b, v in zip(batches, old[iteration], strict=True)]
                if config.loss_type == "rtb":
                    batches = self.balanced(batches, experience)
                stats = self.accumulate(batches, self.denominators(experience, iteration))
                if iteration == 0:
                    first = self.first_ratio(step, experience, batches, stats)
            total = added(total, stats)
            norms.append(self._optimize(stats, f"step {step}, iteration {iteration}"))
        metrics = {"lr": rate, "grad_norm": float(torch.stack(norms).mean()), **first}
        for modality, stats in total.items():
            name = modality.name.lower()
            values = self._reduced(stats).means()
            metrics |= {f"{k}/{name}": values[k] for k in ("clip_low", "clip_high", "tokens")}
            metrics[f"kl/{name}"] = values["kl_old" if self.reference is None else "kl_ref"]
        return metrics

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear warm-up over warmup_steps, times a decay to 0 at max_steps (or none)."""
        config = self.config
        warm = min((step + 1) / max(config.warmup_steps, 1), 1.0)
        left = max(1 - step / max(config.max_steps, 1), 0.0)
        falls = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return config.learning_rate * warm * falls[config.lr_schedule]

    def _optimize(self, stats: Stats, where: str) -> Tensor:
        """One step of the optimizer; returns the gradients' norm."""
        with self.weights.apart():
            norm: Any = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
            if self.accelerator.scaler is None:  # with a scaler (float16), accelerate skips such a step
                check_finite(torch.as_tensor(norm), stats, where)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return torch.as_tensor(norm)

    # ---------------------------------------------------------------- scores

    def batches(self, experience: Experience, iteration: int) -> list[MicroBatch]:
        """The micro-batches of an inner iteration. Without a KL term, rollouts without an advantage are left out; so
        are segments, unless the loss has one ratio per sequence."""
        by_token = LOSSES[self.config.loss_type][1] == "token"
        leave_out = "" if self.reference is not None else "segments" if by_token else "rows"
        batches = experience.micro_batches(*self._sizes, iteration, leave_out)
        if self.config.importance_cap is not None:
            batches = [dataclasses.replace(b, drawn_RL=experience.drawn_BL[b.rows]) for b in batches]
        return batches

    def values(self, model: Any, batch: MicroBatch) -> Tensor:
        """float32 [R, L]: a policy's values, as the estimators define them."""
        return self.combined(self.log_probs(model, batch, batch.passes), batch)

    def log_probs(self, model: Any, batch: MicroBatch, passes: Sequence[slice]) -> Tensor:
        """float32 [K, R, L]: log-probabilities of the views in these passes."""
        views, canvas = batch.draw.views, batch.canvas
        temperature: Any = (self.config.text_temperature, self.config.image_temperature)
        if batch.warmth_RL is not None:
            temperature = canvas.modality.new_tensor(temperature, dtype=torch.float32)[canvas.modality.clamp(min=0)]
            temperature = temperature * batch.warmth_RL
        return torch.cat([run_views(model, canvas, views[part], temperature, batch.guidance) for part in passes])

    def combined(self, logp_KRL: Tensor, batch: MicroBatch) -> Tensor:
        """float32 [R, L]: values, combined from the log-probabilities of all views."""
        return values_of(batch.canvas, batch.draw, logp_KRL, *self.estimators, batch.advantage_RL)

    @torch.no_grad()
    def old_values(self, experience: Experience) -> list[list[Tensor]] | None:
        """The old policy's values of each iteration's micro-batches. None if there is only one iteration, or if no
        trained modality has an importance ratio."""
        if self.config.num_iterations == 1 or self.config.loss_type == "rtb":
            return None
        trained = self.denominators(experience, 0)
        if not any(e.ratio and trained[m].weight > 0 for m, e in zip(Modality, self.estimators)):
            return None
        iterations = range(self.config.num_iterations)
        return [[self.values(self.model, batch) for batch in self.batches(experience, i)] for i in iterations]

    @torch.no_grad()
    def reference_values(self, batch: MicroBatch) -> Tensor | None:
        """The reference policy's values, in the precision of the prepared policy; None without a reference."""
        if self.reference is None:
            return None
        with self.accelerator.autocast(), self.reference.active() as reference:
            return self.values(reference, batch)

    @torch.no_grad()
    def balanced(self, batches: Sequence[MicroBatch], experience: Experience) -> list[MicroBatch]:
        """Adds reference values to the micro-batches, and replaces their advantages by those of `balance`. These depend
        on the policy's log-probabilities of the whole group."""
        device = experience.canvas.ids.device
        change_B = torch.zeros(experience.canvas.shape[0], dtype=torch.float64, device=device)
        batches = [dataclasses.replace(b, reference_RL=self.reference_values(b)) for b in batches]
        for batch in batches:
            assert batch.reference_RL is not None
            gap_RL = (self.values(self.model, batch) - batch.reference_RL).double()
            change_B[batch.rows] = (gap_RL * batch.weight_RL).sum(1)
        trained = experience.trained_BL.any(1).nonzero()[:, 0]
        mean_B = experience.advantage_BL.double().sum(1) / experience.trained_BL.sum(1).clamp(min=1)
        own_B = torch.zeros_like(change_B)
        groups = experience.routed.group_B.to(device)
        own_B[trained] = balance.residuals(mean_B[trained], change_B[trained], groups[trained], self.config.beta)
        own_BL = (own_B[:, None] * experience.trained_BL).float()
        return [dataclasses.replace(b, advantage_RL=own_BL[b.rows]) for b in batches]

    # ---------------------------------------------------------------- gradients

    def accumulate(self, batches: Sequence[MicroBatch], denominators: dict[Modality, Denominators]) -> Stats:
        """Accumulates the gradients of one inner iteration."""
        total: Stats = {}
        for at, batch in enumerate(batches):
            if batch.reference_RL is None:
                batch = dataclasses.replace(batch, reference_RL=self.reference_values(batch))
            total = added(total, self.backward(batch, denominators, last=at + 1 == len(batches)))
        return total

    def loss(
        self, batch: MicroBatch, new_RL: Tensor, denominators: dict[Modality, Denominators]
    ) -> tuple[Tensor, Stats]:
        """A micro-batch's part of the step's loss. new_RL: the trained policy's values."""
        config = self.config
        loss_type, level = LOSSES[config.loss_type]
        balanced = loss_type == "rtb"
        weight_RL = batch.weight_RL
        if batch.reference_RL is None:  # a row that runs only to synchronise processes is not counted
            weight_RL = weight_RL * (batch.advantage_RL != 0).any(1, keepdim=True)
        old_RL = new_RL.detach() if batch.old_RL is None else batch.old_RL
        advantage_RL = batch.advantage_RL
        if batch.drawn_RL is not None:
            assert config.importance_cap is not None
            advantage_RL = advantage_RL * (old_RL - batch.drawn_RL).exp().clamp(max=config.importance_cap)
        loss, stats = modality_loss(
            new_RL,
            old_RL,
            advantage_RL,
            weight_RL,
            batch.canvas.modality,
            loss_type=loss_type,
            denominators=denominators,
            weights={Modality.TEXT: config.text_weight, Modality.IMAGE: config.image_weight},
            without_ratio=[m for m, e in zip(Modality, self.estimators) if balanced or not e.ratio],
            level=level,
            epsilon_low=config.clip_range[0],
            epsilon_high=config.clip_range[1],
            delta=config.delta,
            beta=0.0 if balanced else config.beta,
            logp_ref_BL=batch.reference_RL,
        )
        # Undo the averaging of gradients by accelerate (over processes and accumulation steps): the loss is a sum.
        return loss * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps, stats

    def backward(self, batch: MicroBatch, denominators: dict[Modality, Denominators], last: bool) -> Stats:
        """Adds the gradients of a micro-batch. last: processes synchronise in its last backward pass.

        Views that do not fit into one pass run part by part. While one part is differentiated, the other parts'
        log-probabilities are constants. They are computed first under no_grad, unless each token's loss depends only
        on its own part.
        """
        stats: Stats = {}
        if len(batch.passes) == 1:
            with self._gradients(last):
                loss, stats = self.loss(batch, self.values(self.policy, batch), denominators)
                self.weights.backward(loss)
            return stats
        if LOSSES[self.config.loss_type][1] == "token" and self._scored_once(batch):
            logp_KRL = torch.zeros(len(batch.draw.views), *batch.canvas.shape, device=batch.rows.device)
        else:
            with torch.no_grad():
                logp_KRL = self.log_probs(self.policy, batch, batch.passes)
        for k, part in enumerate(batch.passes):
            with self._gradients(last and k + 1 == len(batch.passes)):
                logp = self.log_probs(self.policy, batch, [part])
                logp_KRL = logp_KRL.detach().clone()
                logp_KRL[part] = logp
                loss, stats = self.loss(batch, self.combined(logp_KRL, batch), denominators)
                self.weights.backward(loss)
        return stats

    def _scored_once(self, batch: MicroBatch) -> bool:
        """Whether each token's value depends only on its log-probability in one view."""
        if not all(e.by_token for e in self.estimators):
            return False
        return int(torch.stack([view.scored for view in batch.draw.views]).sum(0).max()) <= 1

    @contextlib.contextmanager
    def _gradients(self, synchronised: bool) -> Iterator[None]:
        """Wraps a forward and its backward pass. synchronised: gradients are exchanged with the other processes."""
        apart = contextlib.nullcontext() if synchronised else self.accelerator.no_sync(self.policy)
        with apart, activations.recomputed(self.model, self.config.gradient_checkpointing):
            yield

    # ---------------------------------------------------------------- over all processes

    def denominators(self, experience: Experience, iteration: int) -> dict[Modality, Denominators]:
        """The denominators of an inner iteration's losses: sums over the whole step and all processes."""
        lengths = [longest(r, self.model.spec, self.config.max_rounds) for r in experience.rollouts]
        weight_BL, modality_BL = experience.weight_BL(iteration), experience.canvas.modality
        own = []
        for m in Modality:
            counts = Denominators.of(weight_BL * (modality_BL == m), 0.0).tensor()
            own.append(torch.cat([counts, counts.new_tensor([sum(length[m] for length in lengths)])]))
        sums: Any = self.accelerator.reduce(torch.stack(own).to(weight_BL.device), "sum")
        # If a step has several kinds of responses, `max_length` is the mean over its rows.
        return {m: Denominators.from_tensor(sums[m][:3], float(sums[m][3] / sums[m][0])) for m in Modality}

    @torch.no_grad()
    def first_ratio(
        self, step: int, experience: Experience, batches: Sequence[MicroBatch], stats: Stats
    ) -> dict[str, float]:
        """Largest |ρ − 1| at the first inner iteration, where the policy has not changed; more than float noise is a
        bug. Compares the new with the old policy, if there are old values. Every `check_ratio_every` steps it also
        compares rows scored alone with their micro-batch, and measures `ratio.rollout_drift`."""
        config, found = self.config, {}
        gaps = [0.0, *(float(s.peak) for s in stats.values())] if batches[0].old_RL is not None else []
        if config.check_ratio_every and step % config.check_ratio_every == 0:
            gaps.append(ratio.company_gap(lambda batch: self.values(self.model, batch), experience, batches))
            drift = torch.zeros(3, dtype=torch.float64, device=experience.canvas.ids.device)
            if self.accelerator.is_main_process:  # it has the first rollouts of the step
                drift = ratio.rollout_drift(
                    lambda batch: self.log_probs(self.model, batch, batch.passes), experience, *self._sizes
                )
            total, count = self.accelerator.reduce(drift[:2], "sum").tolist()  # type: ignore[union-attr]
            found["rollout_drift"] = total / max(count, 1.0)
            found["rollout_drift_max"] = largest(self.accelerator, float(drift[2]))
        if not gaps:
            return {}
        found |= {"ratio_first_iteration_max_dev": largest(self.accelerator, *gaps)}
        if config.scales and not config.score_guidance:
            guidance = guidance_of(self.model, experience.rollouts, config.scales)
            sizes = (config.num_generations, *self._sizes)
            gap = ratio.guidance_gap(lambda batch: self.values(self.model, batch), experience, guidance, *sizes)
            found["guidance_ratio_max_dev"] = largest(self.accelerator, gap)
        return found

    @property
    def _sizes(self) -> tuple[int, str]:
        """`size` and `attention` of `batches.cut`."""
        return self.config.micro_batch_size, self.model.spec.attention

    def _reduced(self, stats: LossStats) -> LossStats:
        if self.accelerator.num_processes == 1:
            return stats
        sums: Any = self.accelerator.reduce(stats.sums_K, "sum")
        return LossStats(sums, torch.tensor(largest(self.accelerator, float(stats.peak))))
