"""Logits in float32 of hidden states and head rows in half precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Rows of [positions, head rows] logits that are alive at once when scoring, in numbers (256 MiB of float32).
LOGITS_AT_ONCE = 1 << 26

# torch.mm with out_dtype, which adds up in float32 and does not round: from torch 2.8, on GPUs.
_UNROUNDED_MM = "dtype" in torch.ops.aten.mm.overloads()


def float32_logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """float32 [..., V]: hidden states [..., d] times head rows [V, d], both of one float dtype.

    Half-precision factors (theirs, or autocast's) have exact products, which are added up in float32, and the sums stay
    as they are. A head of the usual kind rounds them to its dtype: to a multiple of 1/8 at 16 in bfloat16, so that a
    clip range of .01 would fall between two neighbours. Gradients are those of the usual head.
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
    """Hidden states [K, d] and ids [K] -> log-probabilities [K], in chunks. Of several chunks no logits are kept for
    the backward pass: they are computed again there.

    log_probs: (hidden, temperature=, guidance=) -> [k, V], over the ids from ids[0] on, ids[1] excluded. temperature: a
    number, or [K]. guidance: as `UnifiedModel.log_probs` takes it.
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
