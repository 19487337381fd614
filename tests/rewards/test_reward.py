"""Reward functions: marking, naming, calling, and every way in which one can fail."""

import asyncio
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff.rewards.names import REWARDS, as_rewards, register, resolve
from unidiff.rewards.reward import Cause, RewardError, reward
from unidiff.rewards.segment_view import SegmentView, SequenceView, link_row
from unidiff.rewards.table import reward_table
from unidiff.sequence import Modality


def text(content, **kwargs):
    return SegmentView(modality=Modality.TEXT, tokens=torch.arange(len(content)), text=content, **kwargs)


def picture(gray=7, **kwargs):
    pixels = np.full((4, 6, 3), gray, dtype=np.uint8)
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=pixels, **kwargs)


def rows(count=3):
    """Rows of text, image, text with an answer column."""
    return [
        link_row([text(f"a{i}"), picture(i), text(f"b{i}")], prompt=["q", f"p{i}"], task=i, columns={"answer": i})
        for i in range(count)
    ]


def only(function, **kwargs):
    """The table of one reward on three rows (six text segments)."""
    return reward_table([reward(function, name="f", **kwargs)], rows())


# ---------------------------------------------------------------------------------------------- views


def test_link_row_puts_segments_in_context():
    given = Image.new("RGB", (2, 2))
    first, second, third, fourth = link_row(
        [text("one"), picture(1), text("two", ended=False), picture(2)], prompt=["q", given], task="t"
    )
    assert [v.index for v in (first, second, third, fourth)] == [0, 1, 2, 3]
    assert [v.round for v in (first, second, third, fourth)] == [0, 0, 1, 1]
    assert [v.last for v in (first, second, third, fourth)] == [False, False, False, True]
    assert fourth.before == (first, second, third) and fourth.texts_before == ["one", "two"]
    assert first.image_before is given and second.image_before is given
    assert third.image_before is second.image and fourth.images_before == [second.image]
    assert second.image.getpixel((0, 0)) == (1, 1, 1) and second.image.size == (6, 4)
    assert first.image is None and text("x").image_before is None
    whole = SequenceView((first, second, third, fourth))
    assert whole.texts == ["one", "two"] and whole.images == [second.image, fourth.image]
    assert whole.task == "t" and whole.prompt == ["q", given] and not whole.ended
    assert SequenceView((first,)).ended and not SequenceView((third,)).ended


def test_views_are_cheap():
    contents = [picture() if s % 2 else text("x") for s in range(9)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(64):
            link_row(contents, columns={"answer": 1})
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


# ---------------------------------------------------------------------------------------------- marking


def test_marks_functions_objects_and_calls():
    @reward
    def bare(segments):
        """Says one."""
        return [1.0] * len(segments)

    @reward(on="image", weight=2, name="other")
    def named(segments, **columns):
        return [0.5] * len(segments)

    class Judge:
        async def __call__(self, segments):
            return [0.0] * len(segments)

    judge = reward(Judge(), on="sequence", credit="both")
    assert (bare.name, bare.on, bare.weight, bare.credit) == ("bare", "text", 1.0, ("text",))
    assert bare.__doc__ == "Says one." and bare([1, 2]) == [1.0, 1.0] and not bare.asynchronous
    assert (named.name, named.on, named.weight, named.credit) == ("other", "image", 2.0, ("image",))
    assert judge.name == "Judge" and judge.asynchronous and judge.credit == ("text", "image")
    table = reward_table([bare, named, judge], rows())
    assert table.values_BSF[..., 0].nansum() == 6 and table.values_BSF[..., 1].nansum() == 1.5
    assert table.sequence_BF[:, 2].tolist() == [0, 0, 0] and not table.lost


@each(
    ("options", "message"),
    [
        ({"on": "picture"}, "on='picture'; choose one of text, image, sequence"),
        ({"weight": float("nan")}, "reward 'f': weight is nan; it must be a finite number"),
        ({"weight": "2"}, "reward 'f': weight is '2'; it must be a number"),
        ({"retries": 1.5}, "retries is 1.5; it must be a whole number"),
        ({"required": "no"}, "required is 'no'; it must be true or false"),
        ({"timeout": 0}, "timeout=0"),
        ({"scale": "std"}, "scale='std'; choose one of group, batch, none, rank, or None"),
        ({"retries": -1}, "retries=-1"),
        ({"breaker": 0}, "breaker=0"),
        ({"on": "image", "credit": "text"}, "credit is for on='sequence'"),
        ({"on": "sequence", "credit": "words"}, "credit='words'"),
        ({"on": "sequence", "credit": ("text", "last")}, "choose 'text', 'image', 'both' or 'last'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reward(lambda segments: [], name="f", **options)


def test_registry_and_names():
    @register("test/ones")
    @reward(on="text")
    def ones(segments):
        return [1.0] * len(segments)

    try:
        assert resolve("test/ones").name == "test/ones" and ones.name == "ones"
        assert reward_table(["test/ones"], rows()).names == ("test/ones",)
        with pytest.raises(ValueError, match="registered already"):
            register("test/ones")(ones)
        with pytest.raises(ValueError, match="did you mean 'test/ones'"):
            resolve("test/one")
        with pytest.raises(ValueError, match="two rewards are named 'ones'"):
            as_rewards([ones, ones])
    finally:
        del REWARDS["test/ones"]


def test_names_with_weights():
    @reward(on="image", weight=3.0, timeout=2.0, scale="rank")
    def mine(segments):
        return [1.0] * len(segments)

    heavier = resolve("mine=0.25", own=[mine])
    assert (heavier.weight, heavier.on, heavier.timeout, heavier.scale) == (0.25, "image", 2.0, "rank")
    assert mine.weight == 3.0 and resolve(" mine ", own=[mine]) is mine
    assert [one.weight for one in as_rewards("mine = -2e-1,", own=[mine])] == [-0.2]
    for weight in ("heavy", "", "nan"):
        with pytest.raises(ValueError, match=f"weight '{weight}' is not a finite number"):
            resolve(f"mine={weight}", own=[mine])
    with pytest.raises(ValueError, match="unknown reward 'mime'; did you mean 'mine'"):
        resolve("mime=2", own=[mine])
    for name in ("a=b", "a,b", "a:b", "a b", ""):
        with pytest.raises(ValueError, match="a name has no '='"):
            register(name)


def test_resolve_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_xyz.py").write_text(
        "from unidiff.rewards.reward import reward\n"
        "@reward(on='image')\ndef nice(segments): return [1.0] * len(segments)\n"
        "def unmarked(segments): return []\n"
        "def like_trl(completion_ids, **kwargs): return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("my_rewards_xyz:nice").on == "image"
    assert resolve("my_rewards_xyz:nice=0.5").weight == 0.5
    assert resolve("my_rewards_xyz:like_trl=2").weight == 2 and resolve("my_rewards_xyz:like_trl").on == "sequence"
    with pytest.raises(ValueError, match="has no 'nise'; did you mean 'nice'"):
        resolve("my_rewards_xyz:nise")
    with pytest.raises(ValueError, match="No module named 'nowhere_xyz'"):
        resolve("nowhere_xyz:f")
    assert resolve("my_rewards_xyz.nice=0.5").weight == 0.5
    with pytest.raises(TypeError, match="mark the function with @reward"):
        resolve("my_rewards_xyz:unmarked")


# ---------------------------------------------------------------------------------------------- columns


def test_columns_are_what_the_signature_accepts():
    seen = {}

    def named(segments, answer, extra=None):
        seen["named"] = (answer, extra)
        return [1.0] * len(segments)

    def everything(segments, **columns):
        seen["everything"] = columns
        return [1.0] * len(segments)

    def none(segments):
        return [1.0] * len(segments)

    table = reward_table([reward(f) for f in (named, everything, none)], rows())
    assert not table.lost
    assert seen["named"] == ([0, 0, 1, 1, 2, 2], None)
    assert seen["everything"] == {"answer": [0, 0, 1, 1, 2, 2]}


def test_columns_that_only_some_rows_have():
    mixed = [link_row([text("a")], columns={"answer": 1, "segments": 5}), link_row([text("b")])]
    table = reward_table([reward(lambda segments, **columns: [float(columns == {"answer": [1, None]})] * 2)], mixed)
    assert table.values_BSF.flatten().tolist() == [1.0, 1.0]


def test_asking_for_an_absent_column_says_which():
    table = only(lambda segments, solution: [1.0] * len(segments))
    assert table.lost == {("f", Cause.RAISED): 6}
    assert "asks for the column 'solution'; the rows have: answer" in table.messages["f", Cause.RAISED]


# ---------------------------------------------------------------------------------------------- faults


def boom(segments):
    raise KeyError("no such key")


async def async_boom(segments):
    await asyncio.sleep(0)
    raise TimeoutError("the server was slow")


WHOLE_FAULTS = {
    "raises": (boom, Cause.RAISED, "raised KeyError: 'no such key'"),
    "async raises its own timeout": (async_boom, Cause.RAISED, "TimeoutError: the server was slow"),
    "too short": (lambda s: [1.0] * 5, Cause.WRONG_LENGTH, "returned 5 values for 6 segments"),
    "tensor too long": (lambda s: torch.ones(7), Cause.WRONG_LENGTH, "returned 7 values"),
    "nothing": (lambda s: None, Cause.WRONG_TYPE, "returned NoneType, not a list"),
    "a string": (lambda s: "123456", Cause.WRONG_TYPE, "returned str"),
    "a float": (lambda s: 1.0, Cause.WRONG_TYPE, "returned float"),
    "a dict": (lambda s: dict.fromkeys(range(6), 1.0), Cause.WRONG_TYPE, "returned dict"),
    "a matrix": (lambda s: torch.ones(6, 1), Cause.WRONG_TYPE, r"shape [6, 1], not [6]"),
    "a scalar tensor": (lambda s: torch.tensor(1.0), Cause.WRONG_TYPE, "shape []"),
    "complex": (lambda s: np.ones(6, dtype=complex), Cause.WRONG_TYPE, "a complex"),
    "strings": (lambda s: np.array(["1"] * 6), Cause.WRONG_TYPE, "returned a str ('1')"),
    "NaN": (lambda s: torch.full((6,), float("nan")), Cause.NOT_FINITE, "returned nan"),
    "too big": (lambda s: [10**400] * 6, Cause.NOT_FINITE, "returned inf"),
    "too big for float32": (lambda s: [1e39] * 6, Cause.NOT_FINITE, "not finite in float32"),
    "None": (lambda s: [None] * 6, Cause.NONE, "not applicable"),
}


@each("fault", WHOLE_FAULTS)
def test_a_fault_loses_the_rewards_own_values_only(fault):
    function, cause, message = WHOLE_FAULTS[fault]
    good = reward(lambda segments: [0.25] * len(segments), name="good")
    table = reward_table([reward(function, name="bad"), good], rows())
    assert table.lost == {("bad", cause): 6}
    assert message in table.messages["bad", cause]
    assert table.values_BSF[..., 0].isnan().all()
    assert table.values_BSF[:, ::2, 1].tolist() == [[0.25, 0.25]] * 3


def test_a_bad_item_loses_its_own_value_only():
    values = [1.0, None, float("nan"), "x", float("-inf"), True]
    table = only(lambda segments: values)
    expected = {Cause.NONE: 1, Cause.NOT_FINITE: 2, Cause.WRONG_TYPE: 1}
    assert table.lost == {("f", cause): count for cause, count in expected.items()}
    scored = table.values_BSF[:, ::2, 0].flatten()
    assert scored[0] == 1 and scored[5] == 1 and scored[1:5].isnan().all()


@each("kind", [list, tuple, np.array, torch.tensor])
def test_accepted_kinds(kind):
    assert not only(lambda segments: kind([0.5, 1, 0, -2, 1.5, 3])).lost


def test_items_may_be_numpy_or_tensor_scalars():
    assert not only(lambda s: [np.float32(1), torch.tensor(2.0), np.bool_(True), np.int64(3), 1, True]).lost


@pytest.mark.parametrize("timeout", [None, 5])
def test_rewards_build_no_graph(timeout):
    weight = torch.ones(6, requires_grad=True)

    async def later(segments):
        return [float((weight * 2).requires_grad)] * len(segments)

    for function in (lambda segments: [float((weight * 2).requires_grad)] * len(segments), later):
        assert only(function, timeout=timeout).values_BSF.nansum() == 0
    assert torch.is_grad_enabled()


def test_required_makes_a_loss_fatal():
    with pytest.raises(RewardError, match=r"'f' is required .* sample 1, segment 2: not_finite: returned inf"):
        only(lambda segments: [1, 1, 1, float("inf"), 1, 1], required=True)
    with pytest.raises(RewardError, match=r"sample 0: raised: raised KeyError"):
        only(boom, on="sequence", required=True)
    with pytest.raises(RewardError, match="none"):
        only(lambda segments: [None] * 6, required=True)


def test_a_reward_without_segments_is_not_called():
    calls = []
    table = reward_table([reward(lambda s: calls.append(1) or [], on="image", name="f")], [link_row([text("a")]), ()])
    assert not calls and not table.lost and table.values_BSF.shape == (2, 1, 1)
