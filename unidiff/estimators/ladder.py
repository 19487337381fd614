"""The ladder of mask ratios over the inner iterations."""

from __future__ import annotations


def ratio(min_ratio: float, iteration: int, iterations: int) -> float:
    """r_i = min(γ + (1−γ)(i+1)/μ, 0.999), for inner iteration i = 0 … μ−1.

    Source: the code of MaskGRPO (arXiv 2510.02880); its text writes j/μ where this has (i+1)/μ.
    """
    return min(min_ratio + (1 - min_ratio) * (iteration + 1) / iterations, 0.999)
