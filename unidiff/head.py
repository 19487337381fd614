"""float32 logits from hidden states and head rows in half precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Maximum number of logits (positions × head rows) in memory at once when scoring: 256 MiB of float32.
LOGITS_AT_ONCE = 1 << 26

# torch.mm with out_dtype accumulates in float32 and does not round: from torch 2.8, on GPUs.
_UNROUNDED_MM = "dtype" in torch.ops.aten.mm.overloads()


def float32_logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """float32 [..., V]: hidden states [..., d] times head rows [V, d], both of one float dtype.

    Products of half-precision factors (also autocast's) are exact; they are summed in float32, and the sums are not
    rounded. A usual head rounds them to its dtype. In bfloat16 a logit of 16 is then a multiple of 1/8, coarser than a
    clip range of 0.01. Gradients are those of a usual head.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, rows = hidden.to(dtype), rows.to(dtype)
    if hidden.dtype.itemsize > 2:
        return nn.functional.linear(hidden, rows).float()
    return _Unrounded.apply(hidden, rows)  # type: ignore[return-value]


def target_log_probs(
    log_probs: Callable[..., Tensor],
    hidden: Tensor,
    target: Tensor,
    ids: tuple[int, int],
    temperature: float | Tensor,
    guidance: Sequence[tuple[float, Tensor]],
) -> Tensor:
    """Hidden states [K, d] and ids [K] -> log-probabilities [K], in chunks. With several chunks, logits are not kept
    but recomputed in the backward pass.

    log_probs: (hidden, temperature=, guidance=) -> [k, V], over the ids from ids[0] to ids[1] - 1. temperature: a
    number, or [K]. guidance: as in `UnifiedModel.log_probs`.
    """
    low, high = ids
    warmth = (temperature[:, None],) if isinstance(temperature, Tensor) else ()

    def of_chunk(hidden: Tensor, target: Tensor, *others: Tensor) -> Tensor:
        terms = [(scale, other) for (scale, _), other in zip(guidance, others)]
        found = log_probs(hidden, temperature=others[-1] if warmth else temperature, guidance=terms)
        return found.gather(1, (target - low)[:, None])[:, 0]

    each = (hidden, target, *(other for _, other in guidance), *warmth)
    chunk = max(LOGITS_AT_ONCE // (high - low), 1)
    if len(hidden) <= chunk:
        return of_chunk(*each)
    chunks = zip(*(x.split(chunk) for x in each))
    return torch.cat([checkpoint(of_chunk, *one, use_reentrant=False, preserve_rng_state=False) for one in chunks])


class _Unrounded(torch.autograd.Function):
    """Half-precision hidden states [..., d] and rows [V, d] to float32 [..., V]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, rows)
        if hidden.is_cuda and _UNROUNDED_MM:
            flat = torch.mm(hidden.reshape(-1, hidden.shape[-1]), rows.T, out_dtype=torch.float32)
            return flat.reshape(*hidden.shape[:-1], len(rows))
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), rows.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, rows = ctx.saved_tensors
        grad, width = grads[0].to(hidden.dtype), hidden.shape[-1]
        of_hidden, of_rows = ctx.needs_input_grad
        return (
            grad @ rows if of_hidden else None,
            grad.reshape(-1, len(rows)).T @ hidden.reshape(-1, width) if of_rows else None,
        )
