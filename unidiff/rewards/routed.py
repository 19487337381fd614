"""The router's result: advantages, and how each was computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Account:
    """How the advantages of an assignment were computed.

    assignment, scale, leave_one_out: the router's settings.
    terms_BSF: float64, each reward's term in the sum for a segment, before its weight: a value, or a mean over the
               row's segments, on the reward's own scale. NaN = none.
    total_BS:  float64, the weighted sum of the terms. Totals are compared within groups.
    mean_BS, std_BS, count_BS: float64, mean, std and number of the totals in the comparison.
    divisor_BS: float64, the divisor of the difference from the mean.
    """

    assignment: str
    scale: str
    leave_one_out: bool
    terms_BSF: Tensor
    total_BS: Tensor
    mean_BS: Tensor
    std_BS: Tensor
    count_BS: Tensor
    divisor_BS: Tensor


@dataclass(frozen=True, eq=False)
class Routed:
    """Advantages of B rollouts with at most S sampled segments.

    group_B:      int64, the group (prompt) of each row, numbered from 0.
    advantage_BS: float32, 0 wherever `valid_BS` is False.
    valid_BS:     bool: the segment exists, was scored, and can be compared with another scored one of its group. A
                  constant group is valid with advantage 0; a group that lost its values is not valid.
    metrics:      `reward/<name>` (mean, unweighted), `lost/<name>` (share lost to faults), `lost/<name>/<cause>` (for
                  each cause that occurred), `not_applicable/<name>` (share of None; 1, and no other metric, if a reward
                  had no segment to score). Under every assignment also, of the factorized totals:
                  `group_std/<modality>`, `zero_std/<modality>` (share of the scored groups), `advantage_correlation`
                  between the modalities. A number that does not exist in this batch is absent.
    account:      how the advantages were computed; None for a custom function.
    """

    group_B: Tensor
    advantage_BS: Tensor
    valid_BS: Tensor
    metrics: dict[str, float]
    account: Account | None = None

    def rows(self, chosen: slice) -> Routed:
        """Selects rows; metrics remain those of all rows."""
        account = self.account
        if account is not None:
            account = replace(account, **{name: value[chosen] for name, value in _tensors(account).items()})
        return Routed(self.group_B[chosen], self.advantage_BS[chosen], self.valid_BS[chosen], self.metrics, account)

    def only(self, keep_BS: Tensor) -> Routed:
        """Makes segments outside of `keep_BS`, bool, invalid with advantage 0. The account stays."""
        return replace(self, advantage_BS=self.advantage_BS * keep_BS, valid_BS=self.valid_BS & keep_BS)

    def explain(self, sample: int, segment: int, names: tuple[str, ...], weights: tuple[float, ...]) -> list[str]:
        """Explains a segment's advantage in words, one line per step. names, weights: of the rewards."""
        advantage = self.advantage_BS[sample, segment].item()
        if self.account is None:
            return [self._closing(sample, segment, f"a function of yours gave it {advantage:.4g}")]
        a = self.account
        terms = [
            f"{weight:g} × {value:.4g} ({name})"
            for name, weight, value in zip(names, weights, a.terms_BSF[sample, segment].tolist())
            if not math.isnan(value)
        ]
        total, mean, std, count, divisor = (
            float(part[sample, segment]) for part in (a.total_BS, a.mean_BS, a.std_BS, a.count_BS, a.divisor_BS)
        )
        lines = [
            f"  {a.assignment} ({_MEANING[a.assignment]}): " + (" + ".join(terms) or "no value") + f" = {total:.4g}"
        ]
        if math.isnan(total):
            return [lines[0].removesuffix(" = nan"), self._closing(sample, segment, "")]
        among = "batch" if a.assignment == "normalize_then_sum" else f"group {int(self.group_B[sample])}"
        spread = "" if math.isnan(std) else f", std {std:.4g}"
        lines.append(f"  compared in {among} with {int(count)} values: mean {mean:.4g}{spread}")
        sum_of = f"({total:.4g} - {mean:.4g})" + (f" / {divisor:.4g}" if divisor != 1 else "")
        if a.leave_one_out and a.assignment != "normalize_then_sum" and count > 1:
            sum_of = f"{int(count)}/{int(count) - 1} × {sum_of}"  # leave one out
        return [*lines, self._closing(sample, segment, "all are equal" if std == 0 else sum_of)]

    def _closing(self, sample: int, segment: int, how: str) -> str:
        if not bool(self.valid_BS[sample, segment]):
            compared = self.account is not None and float(self.account.count_BS[sample, segment]) > 1
            why = "it was cut off" if compared else "nothing to compare it with"
            return f"  no advantage: {why}; its tokens are not trained"
        advantage = self.advantage_BS[sample, segment].item()
        return f"  advantage of each of its sampled tokens: {how} = {advantage:.4g}"

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and the rest as JSON data."""
        tensors, header = _tensors(self), dict[str, Any](metrics=self.metrics)
        if self.account is not None:
            parts = _tensors(self.account)
            tensors |= parts
            header["account"] = {k: v for k, v in vars(self.account).items() if k not in parts}
        return {name: value.contiguous() for name, value in tensors.items()}, header

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], header: dict[str, Any]) -> Routed:
        """The inverse of `to_tensors`; other tensors are ignored."""
        account = None
        if (plain := header.get("account")) is not None:
            parts: dict[str, Any] = {f.name: tensors[f.name] for f in fields(Account) if f.name not in plain}
            account = Account(**plain, **parts)
        return Routed(tensors["group_B"], tensors["advantage_BS"], tensors["valid_BS"], header["metrics"], account)


def _tensors(of: Any) -> dict[str, Tensor]:
    """The fields of a dataclass that are tensors."""
    return {name: value for name, value in vars(of).items() if isinstance(value, Tensor)}


_MEANING = {
    "joint": "sum of the row's means",
    "normalize_then_sum": "sum of the row's means, each normalised in its group",
    "factorized": "sum of the row's means, of its modality alone",
    "segment": "sum of this segment's own values",
}
