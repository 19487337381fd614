"""Routing: each assignment against its definition, missing values, independence of the modalities."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.tables import each
from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.router import ASSIGNMENTS, RewardRouter
from unidiff.rewards.table import RewardTable

NAN = float("nan")
T, I, X = (0, 1, -1)


def table(values_BSF, modality_BS, on, sequence_BF=None, weights=None, credit=None, missing=None):
    values = torch.as_tensor(values_BSF, dtype=torch.float32)
    count = values.shape[2]
    sequence = torch.full((len(values), count), NAN) if sequence_BF is None else torch.tensor(sequence_BF)
    return RewardTable(
        names=tuple(f"r{f}" for f in range(count)),
        weights=tuple(weights or [1.0] * count),
        on=tuple(on),
        credit=tuple(credit or [(o,) for o in on]),
        values_BSF=values,
        sequence_BF=sequence,
        modality_BS=torch.tensor(modality_BS),
        missing=missing or {},
    )


def random_table(seed=0, rows=12, rounds=3, drop=0.2):
    """Text, image, text, … rows of unequal length; two text rewards, one on images, one on sequences."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.arange(2 * rounds).remainder(2).repeat(rows, 1)
    lengths = torch.randint(2, 2 * rounds + 1, (rows, 1), generator=generator)
    modality[torch.arange(2 * rounds) >= lengths] = X
    values = torch.randn(rows, 2 * rounds, 4, generator=generator)
    on = ("text", "text", "image", "sequence")
    for f, kind in enumerate((T, T, I, 9)):
        values[..., f][modality != kind] = NAN
    values[torch.rand(values.shape, generator=generator) < drop] = NAN
    sequence = torch.full((rows, 4), NAN)
    sequence[:, 3] = torch.randn(rows, generator=generator)
    credit = (("text",), ("text",), ("image",), ("text",))
    return table(values, modality.tolist(), on, sequence.tolist(), [1.0, 0.5, 2.0, -1.5], credit)


GROUPS = torch.tensor([7, 7, 7, 7, 1, 1, 1, 1, 10**15, 10**15, 10**15, 10**15])


def norm(values):
    """Reference: normalise one group's present values, in a loop's own words."""
    values = torch.as_tensor(values, dtype=torch.float64)
    present = values[~values.isnan()]
    if len(present) < 2 or present.std() < 1e-9:
        return torch.zeros_like(values)
    return ((values - present.mean()) / (present.std() + 1e-4)).nan_to_num(nan=0.0)


def nansum(terms):
    terms = [t for t in terms if t == t]
    return sum(terms) if terms else NAN


def by_hand(given, assignment):
    """Advantages by the definitions, row by row."""
    rows, segments, count = given.values_BSF.shape
    weight, values, sequence = given.weights, given.values_BSF.double(), given.sequence_BF.double()

    def mean(b, f):
        return sequence[b, f].item() if given.on[f] == "sequence" else values[b, :, f].nanmean().item()

    out = torch.zeros(rows, segments, dtype=torch.float64)
    for group in GROUPS.unique():
        members = (group == GROUPS).nonzero().flatten().tolist()
        if assignment == "joint":
            out[members] = norm([nansum(weight[f] * mean(b, f) for f in range(count)) for b in members])[:, None]
        for m, chosen in ((T, (0, 1, 3)), (I, (2,))):
            own = given.modality_BS[members] == m
            if assignment == "factorized":
                total = norm([nansum(weight[f] * mean(b, f) for f in chosen) for b in members])
                out[members] = torch.where(own, total[:, None], out[members])
            if assignment == "segment":
                for k in range(3):
                    place = own & (own.long().cumsum(1) == k + 1)
                    total = [NAN] * len(members)
                    for i, b in enumerate(members):
                        for s in place[i].nonzero().flatten().tolist():
                            total[i] = nansum(
                                weight[f] * (sequence[b, f] if f == 3 else values[b, s, f]).item() for f in chosen
                            )
                    out[members] = torch.where(place, norm(total)[:, None], out[members])
    return torch.where(given.modality_BS >= 0, out, 0.0).float()


@each(("assignment", "seed"), itertools.product(["joint", "factorized", "segment"], range(5)))
def test_assignments_by_their_definition(assignment, seed):
    given = random_table(seed)
    routed = RewardRouter(assignment).route(given, GROUPS)
    torch.testing.assert_close(routed.advantage_BS, by_hand(given, assignment), atol=1e-5, rtol=1e-5)
    assert routed.advantage_BS.dtype == torch.float32 and routed.valid_BS.dtype == torch.bool
    assert (routed.advantage_BS[~routed.valid_BS] == 0).all()


def test_normalize_then_sum_by_its_definition():
    given = random_table(1)
    total = torch.zeros(12, dtype=torch.float64)
    for f, column in enumerate(given.row_means_BF.unbind(1)):
        for group in GROUPS.unique():
            total[group == GROUPS] += given.weights[f] * norm(column[group == GROUPS])
    expected = norm(total)[:, None].expand(12, 6) * (given.modality_BS >= 0)
    routed = RewardRouter("normalize_then_sum").route(given, GROUPS)
    torch.testing.assert_close(routed.advantage_BS, expected.float(), atol=1e-5, rtol=1e-5)


@each(
    ("assignment", "scale", "leave_one_out"),
    itertools.product(("factorized", "segment"), ("group", "batch", "none"), (False, True)),
)
def test_a_modalitys_rewards_do_not_touch_the_other(assignment, scale, leave_one_out):
    router = RewardRouter(assignment, scale, leave_one_out)
    given = random_table(3, drop=0.1)
    base = router.route(given, GROUPS).advantage_BS
    for m, columns in ((T, [0, 1]), (I, [2])):
        permuted = random_table(3, drop=0.1)
        for start in (0, 4, 8):
            order = start + torch.tensor([2, 3, 1, 0])
            permuted.values_BSF[start : start + 4, :, columns] = given.values_BSF[order][..., columns]
            if m == T:
                permuted.sequence_BF[start : start + 4] = given.sequence_BF[order]
        changed = router.route(permuted, GROUPS).advantage_BS
        other = given.modality_BS == 1 - m
        assert torch.equal(changed[other], base[other])
        assert not torch.equal(changed[given.modality_BS == m], base[given.modality_BS == m])


@each("assignment", ASSIGNMENTS)
def test_row_order_and_group_names_do_not_matter(assignment):
    given, order = random_table(4), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    base = RewardRouter(assignment).route(given, GROUPS)
    shuffled = RewardTable(
        given.names, given.weights, given.on, given.credit,
        given.values_BSF[order], given.sequence_BF[order], given.modality_BS[order],
    )  # fmt: skip
    routed = RewardRouter(assignment).route(shuffled, GROUPS[order] * -3)
    torch.testing.assert_close(routed.advantage_BS, base.advantage_BS[order])
    assert torch.equal(routed.valid_BS, base.valid_BS[order])
    assert routed.metrics == pytest.approx(base.metrics)


def test_missing_constant_and_lone_values():
    modality = [[T, I]] * 6
    values = torch.full((6, 2, 2), NAN)
    values[:3, 0, 0] = torch.tensor([0.1, 0.1, 0.1])  # constant group
    values[3:, 0, 0] = torch.tensor([1.0, NAN, NAN])  # one scored row
    values[:3, 1, 1] = torch.tensor([1.0, NAN, 3.0])  # group 1 lost all of its image rewards
    routed = RewardRouter().route(table(values, modality, ["text", "image"]), torch.tensor([0, 0, 0, 1, 1, 1]))
    root = 0.5**0.5
    expected = [[0, -root], [0, 0], [0, root], [0, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(routed.advantage_BS, torch.tensor(expected), atol=1e-4, rtol=0)
    valid = [[True, True], [True, False], [True, True], [False, False], [False, False], [False, False]]
    assert routed.valid_BS.tolist() == valid
    assert routed.metrics["zero_std/text"] == 1 and routed.metrics["zero_std/image"] == 0
    assert routed.metrics["group_std/image"] == pytest.approx(2**0.5)
    assert "advantage_correlation" not in routed.metrics


@each("assignment", ASSIGNMENTS)
def test_everything_lost_gives_nothing_and_does_not_fail(assignment):
    routed = RewardRouter(assignment).route(
        table(torch.full((4, 2, 1), NAN), [[T, I]] * 4, ["text"]), torch.tensor([0, 0, 1, 1])
    )
    assert (routed.advantage_BS == 0).all() and not routed.valid_BS.any()
    assert all(value == value for value in routed.metrics.values())


@each(
    ("credit", "expected"),
    [
        (("text",), [1, 0, 1, 0, 1]),
        (("image",), [0, 1, 0, 1, 0]),
        (("text", "image"), [1, 1, 1, 1, 1]),
        (("last",), [0, 0, 0, 0, 1]),
        (("image", "last"), [0, 1, 0, 1, 1]),
    ],
)
def test_credit_of_sequence_rewards(credit, expected):
    given = table(torch.full((2, 6, 1), NAN), [[T, I, T, I, T, X]] * 2, ["sequence"], [[0.0], [1.0]], credit=[credit])
    groups = torch.zeros(2, dtype=torch.long)
    routed = RewardRouter("segment").route(given, groups)
    assert (routed.advantage_BS[1] > 0).long().tolist() == [*expected, 0]
    factorized = RewardRouter("factorized").route(given, groups)
    text, image = bool({"text", "last"} & set(credit)), "image" in credit
    assert (factorized.advantage_BS[1] > 0).tolist() == [text, image, text, image, text, False]


def test_segment_adds_sequence_rewards_to_each_segments_own():
    values = torch.tensor([[[1.0, NAN], [5.0, NAN]], [[3.0, NAN], [1.0, NAN]]])
    given = table(
        values,
        [[T, T]] * 2,
        ["text", "sequence"],
        [[NAN, 10.0], [NAN, 0.0]],
        [1.0, 0.5],
        [("text",), ("last",)],
    )
    routed = RewardRouter("segment", scale="none").route(given, torch.zeros(2, dtype=torch.long))
    assert routed.advantage_BS.tolist() == [[-1.0, 4.5], [1.0, -4.5]]


def test_metrics():
    missing = {
        (0, 2, 0): Missing(Cause.TIMEOUT, "slow"),
        (0, 3, 0): Missing(Cause.NONE, "no"),
    }
    values = torch.full((4, 2, 2), NAN)
    values[:2, 0, 0] = torch.tensor([1.0, 3.0])
    values[:, 1, 1] = torch.tensor([4.0, 2.0, 0.0, 0.0])
    given = table(values, [[T, I]] * 4, ["text", "image"], weights=[5.0, 1.0], missing=missing)
    metrics = RewardRouter("joint").route(given, torch.tensor([0, 0, 1, 1])).metrics
    assert metrics["reward/r0"] == 2 and metrics["reward/r1"] == 1.5
    assert metrics["lost/r0"] == 0.25 and metrics["not_applicable/r0"] == 0.25 and metrics["lost/r1"] == 0
    assert metrics["lost/r0/timeout"] == 0.25 and "lost/r0/none" not in metrics and "lost/r1/timeout" not in metrics
    assert metrics["zero_std/image"] == 0.5 and metrics["zero_std/text"] == 0
    assert metrics["group_std/text"] == pytest.approx(5 * 2**0.5)
    assert metrics["advantage_correlation"] == pytest.approx(-1)


def test_custom_assignment():
    given = random_table(0)

    def mine(values, segments):
        assert segments.group_B.tolist() == [1] * 4 + [0] * 4 + [2] * 4 and segments.table is given
        assert segments.names == given.names and segments.weights == given.weights
        expected = given.values_BSF.clone()  # sequence reward 3 is credited to text
        expected[..., 3] = torch.where(given.modality_BS == T, given.sequence_BF[:, 3:], NAN)
        torch.testing.assert_close(values, expected, equal_nan=True)
        first = (segments.modality_BS == I) & (segments.round_BS == 0)
        values.zero_()  # it is its own
        advantage = torch.where(first, 2.0, 1.0)
        advantage[0] = NAN
        return advantage

    routed = RewardRouter(mine).route(given, GROUPS)
    exists = given.modality_BS >= 0
    assert not routed.valid_BS[0].any() and torch.equal(routed.valid_BS[1:], exists[1:])
    assert (routed.advantage_BS[1:, 1][exists[1:, 1]] == 2).all()
    assert (routed.advantage_BS[1:, [0, 2, 3]][exists[1:, [0, 2, 3]]] == 1).all()
    assert "advantage_correlation" in routed.metrics and given.values_BSF.nansum() != 0

    def token_wise(values, segments):
        return torch.ones(12, 100)

    with pytest.raises(ValueError, match=r"'token_wise' returned torch.float32 \[12, 100\].*\[12, 6\]"):
        RewardRouter(token_wise).route(given, GROUPS)
    with pytest.raises(ValueError, match="infinite"):
        RewardRouter(lambda values, segments: torch.full((12, 6), float("inf"))).route(given, GROUPS)


# ---------------------------------------------------------------------------------------------- scales of their own


def scaled(given, scale):
    """The table, its reward 1 with a scale."""
    return replace(given, scale=(None, scale, None, None))


@each(("assignment", "scale"), itertools.product(ASSIGNMENTS, ["group", "batch", "none", "rank"]))
def test_a_scale_makes_a_rewards_size_not_matter(assignment, scale):
    router = RewardRouter(assignment)
    given = scaled(random_table(2), scale)
    larger = replace(given, values_BSF=given.values_BSF * torch.tensor([1.0, 1000.0, 1.0, 1.0]))
    before, after = (router.route(t, GROUPS).advantage_BS for t in (given, larger))
    same = torch.allclose(before, after, atol=2e-3)
    assert same is (scale != "none")
    shifted = replace(given, values_BSF=given.values_BSF + torch.tensor([0.0, 7.0, 0.0, 0.0]))
    torch.testing.assert_close(router.route(shifted, GROUPS).advantage_BS, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("assignment", ["joint", "factorized"])
def test_a_ranked_reward_counts_by_its_order(assignment):
    values = torch.full((8, 1, 2), NAN)
    values[:, 0, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    values[:, 0, 1] = torch.tensor([1.0, 2.0, 2.5, 1e6, 5.0, 6.0, 7.0, NAN])
    groups = torch.tensor([0] * 4 + [1] * 4)
    given = replace(table(values, [[T]] * 8, ["text"] * 2, weights=[1.0, 2.0]), scale=(None, "rank"))
    ranks = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0, -1.0, 0.0, 1.0, 0.0])
    total = values[:, 0, 0] + 2 * ranks  # the last row has its first reward alone
    expected = torch.cat([norm(total[:4]), norm(total[4:])]).float()
    routed = RewardRouter(assignment).route(given, groups)
    torch.testing.assert_close(routed.advantage_BS[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_segments_are_ranked_among_those_of_their_round():
    values = torch.tensor([[[1.0], [50.0]], [[2.0], [40.0]], [[9.0], [30.0]]])
    given = replace(table(values, [[T, T]] * 3, ["text"]), scale=("rank",))
    advantage = RewardRouter("segment", scale="none").route(given, torch.zeros(3, dtype=torch.long)).advantage_BS
    assert advantage.tolist() == [[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]]


def test_bad_settings_are_named():
    given = random_table(0)
    with pytest.raises(ValueError, match="assignment='factorised'; choose one of joint"):
        RewardRouter("factorised")
    with pytest.raises(ValueError, match="scale is 'std'; choose one of group, batch, none"):
        RewardRouter(scale="std")  # pyright: ignore
    with pytest.raises(ValueError, match="group 5 has a single rollout"):
        RewardRouter().route(given, torch.tensor([0] * 11 + [5]))
    with pytest.raises(ValueError, match=r"groups_B has shape \[4\]; the table has 12 rows"):
        RewardRouter().route(given, torch.zeros(4, dtype=torch.long))
