"""Measures that several parts use: relative error, KL divergence, a proportion's interval."""

import torch


def relative_error(given: torch.Tensor, other: torch.Tensor) -> float:
    """|given - other| / |given|, by Frobenius norms: relative_error([3, 4], [3, 3]) -> 0.2"""
    return ((given - other).norm() / given.norm().clamp_min(1e-38)).item()


def kl_nats(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """KL(p || q) in nats from log-probabilities (..., vocabulary), averaged over all positions."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): wilson(90, 100) -> (0.826, 0.945)"""
    from scipy.stats import binomtest

    if rows == 0:
        return 0.0, 1.0
    interval = binomtest(correct, rows).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def with_interval(result: dict) -> str:
    """An accuracy_report as text: '90.2% (86.9 to 92.8)'"""
    return f"{percent(result['accuracy'])} ({100 * result['low']:.1f} to {100 * result['high']:.1f})"


def most_values_in_32(weight: torch.Tensor) -> int:
    """Most different values among 32 neighbours of a row of `weight` (out, in).

    16 or fewer: the weights were in 4-bit blocks before (Q4_0, Q4_1).
    """
    width = weight.shape[1] // 32 * 32
    blocks = weight[:, :width].reshape(-1, 32).sort(dim=1).values
    return int((blocks[:, 1:] != blocks[:, :-1]).sum(1).max()) + 1
