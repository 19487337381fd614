"""Ladders of mask ratios over the inner iterations."""

from __future__ import annotations


def ratio(min_ratio: float, iteration: int, iterations: int) -> float:
    """r_i = min(γ + (1−γ)(i+1)/μ, 0.999), for inner iteration i = 0 … μ−1.

    Source: the code of MaskGRPO (arXiv 2510.02880); the paper has j/μ instead of (i+1)/μ.
    """
    return min(min_ratio + (1 - min_ratio) * (iteration + 1) / iterations, 0.999)


def from_start(start: float, iteration: int, iterations: int) -> float:
    """r_i = start + (1−start)·i/(μ−1), for inner iteration i = 0 … μ−1: an even grid from the start to 1; only the
    start if μ is 1.

    Source: UniGRPO (MMaDA, arXiv 2505.15809), where it is t / T. The paper's ablation uses a spacing of T / μ (100,
    300, …, 900) and does not say what happens beyond T; this grid never exceeds T.
    """
    return start + (1 - start) * iteration / max(iterations - 1, 1)
