"""How numbers and final answers of a text are read, and that an odd row costs its own value alone."""

import math
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff.rewards.reward import Cause
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.scorers.answers import final_answer, last_boxes, last_number
from unidiff.scorers.math import MathVerifier, math_answer
from unidiff.scorers.text import exact_answer, numeric_answer
from unidiff.sequence import Modality


def row(text, **columns):
    view = SegmentView(modality=Modality.TEXT, tokens=torch.arange(len(text.split())), text=text)
    return link_row([view], columns=columns)


NUMBERS = {
    # written plainly
    **{"it is 1,234.5.": 1234.5, "2e-3 m": 2e-3, ".5": 0.5, "1E+3": 1000, "3e": 3, "+7": 7, "none": None, "": None},
    # a hyphen behind a digit, a word, a bracket or another hyphen is not a sign
    **{"10-3": 3, "3-5": 5, "2023-12": 12, "2023-12-25": 25, "555-1234": 1234, "(555) 123-4567": 4567, "3--5": 5},
    **{"pages 3–5": 5, "3—5": 5, "COVID-19": 19, "f(x)-2": 2, "20°-30°": 30, "5%-10%": 10, "3-$5": 5, "12 - 5 = 7": 7},
    # nor is it in a range, but what follows a dash is
    **{"-5–-3": -3, "-5--3": -3, "−5–−3": -3, "-10--5 °C": -5, "1–-1": -1, "5−−3": -3, "-3-5": 5, "1.5–2.5": 2.5},
    # elsewhere it is, however it is written
    **{"x = - 3": -3, "$- 3$": -3, "{-}3": -3, "-\\,3": -3, "_-3_": -3, "list:\n- 3": 3, "8 - 3": 3, "3/-4": -0.75},
    **{"−3": -3, "x=-5": -5, "x = –5": -5, "(-5)": -5, "$-5$": -5, "-$5": -5, "10, -3": -3, "−5 °C": -5, "-.5": -0.5},
    **{"between -5 and -3": -3, "－３．５": -3.5},
    # thousands and millions of money, by a letter; in mathematics it is a variable
    **{"$5k": 5000, "-$5K.": -5000, "€1,200k": 1.2e6, "$2.5M": 2.5e6, "$1.2bn": 1.2e9, "$3 big": 3, "$5kk": 5},
    **{"$5k$": 5, "$5k + 1$": 1, "$2 m$": 2, "5k": 5, "$2k^2$": 2, "0x1F": 31, "x0x1F": 1},
    # dates, times, versions
    **{"2023/12/25": 25, "10:30": 30, "version 1.2.3": 3},
    **{"Python 3.11": 3.11, "192.168.0.1": 1, "1.2.3.4": 4, "10.5.2023": 2023, "14:05:09": 9, "the 21st": 21},
    # groups of thousands, and what looks like them
    **{"1,234,567": 1234567, "3,4": 4, "1,2,3": 3, "N(0,1)": 1, "1'234": 1234, "1{,}234": 1234, "1\\,234": 1234},
    **{"1_000": 1000, "1\u202f234\u202f567": 1234567, "1.234.567,89": 1234567.89, "12,345,67": 67},
    **{"1 000": 1000, "12 345 678 km": 12345678, "1 234,56 €": 1234.56, "in 2023 100 people": 100, "1 2 3": 3},
    **{"1,\\!234": 1234, "1\\ 234": 1234, "12,34,567": 1234567, "1.234.567": 1234567, "555 123 4567": 4567},
    **{"12,5 %": 12.5, "0,50 €": 0.5, "1.234": 1.234},
    # currency and per cent
    **{"$1,000.50": 1000.5, "€5": 5, "5€": 5, "\\$5": 5, "Rs.500": 500, "Rs500": 500, "50%": 50, "50 \\%": 50},
    # fractions and powers
    **{"3/4": 0.75, "-3/4": -0.75, "\\frac{3}{4}": 0.75, "-\\frac34": -0.75, "2\\frac{3}{4}": 2.75, "½": 0.5},
    **{"1½": 1.5, "-½": -0.5, "1 1/2": 1.5, "5/0": math.inf, "10^3": 1000, "10³": 1000, "2×10^3": 2000},
    **{"2 x 10^{3}": 2000, "2\\times10^{-3}": 0.002},
    **{"3e8 m/s": 3e8, "3e8m/s": 3e8, "it is 1e5.": 1e5, "1e-100": 1e-100, "1e400": math.inf},
    **{"\\frac{-3}{4}": -0.75, "\\frac{3}{-4}": -0.75, "\\frac{1.5}{2}": 0.75, "\\dfrac{1,000}{4}": 250},
    **{"{3 \\over 4}": 0.75, "3\\frac12": 3.5, "-3\\frac{1}{2}": -3.5, "1.5/2.5": 0.6},
    # a word of size
    **{"1 million": 1e6, "$2.5 million": 2.5e6, "5 thousand": 5000, "3 hundred": 300, "2\\text{ billion}": 2e9},
    **{"1,500 millions": 1.5e9, "-3 Million": -3e6, "3万": 30000, "5 millionaires": 5, "2 lakh": 200000},
    # exponents of units and digits in words are not numbers beside another one
    **{"25 cm^2": 25, "25 m²": 25, "9 m^{-2}": 9, "7 g of H2O": 7, "H2O": 2, "x_2 = 9, so x_1": 9, "the 2nd": 2},
    # other scripts
    **{"３": 3, "١٢": 12, "答案是3": 3, "答案是-3。": -3, "ответ3": 3},
    **{"१२,३४५": 12345, "١٬٢٣٤٫٥": 1234.5, "𝟯𝟰": 34, "②": 2, "３０％": 30, "log₂8": 8, "2⅔": 8 / 3, "−⅔": -2 / 3},
}


@each("text", NUMBERS)
def test_the_last_number_of_a_text_is_read(text):
    found = last_number(text)
    wanted = NUMBERS[text]
    assert found is None if wanted is None else found.value == pytest.approx(wanted, rel=1e-12)


@each(
    ("right", "text", "value"),
    [
        (0.5, "so 50 %", 1.0),
        (50, "so 50%", 1.0),
        ("50%", "so 0.5", 1.0),
        ("50%", "so 5000%", 0.0),
        ("3/4", "0.75", 1.0),
        ("3/4", "1/4", 0.0),
        ("2023-12", "12", 1.0),
        (12, "2023-12", 1.0),
        ("She has <<48/2=24>>24.\n#### 1,024", "#### 1024", 1.0),
        (1000000, "about 1 million people", 1.0),
        ("1 million", "1", 0.0),
        (0.125, "12.5 percent", 1.0),
        (-12, "2023-12", 0.0),
        (Decimal("1.5"), "1½", 1.0),
        (Fraction(1, 3), "1/3", 1.0),
        (np.float32(2), "2", 1.0),
        (np.array(2), "2", 1.0),
        (torch.tensor(2.0), "2", 1.0),
    ],
)
def test_numeric_answers(right, text, value):
    assert reward_table([numeric_answer()], [row(text, answer=right)]).values_BSF.item() == value


@each(
    "part",
    [
        ",111",
        "1 ",
        "1 234",
        "1.2",
        "-5--3",
        "{-}",
        "2 million",
        r"\text{5",
        "1/1/",
        "1*10^",
        r"\frac{1",
        "answer:",
        "<answer>",
        r"\boxed{1}",
    ],
)
def test_reading_takes_linear_time(part):
    text, start = "1" + part * (50_000 // len(part)) + ",11", time.thread_time()
    last_number(text), final_answer(text)
    assert time.thread_time() - start < 5


# ---------------------------------------------------------------------------------------------- odd rows

ODD = {
    "numeric_answer": [
        [3, 4],
        {},
        True,
        float("nan"),
        math.inf,
        "seven",
        10**400,
        b"7",
        1j,
        np.zeros((2, 2)),
        object(),
    ],
    "exact_answer": [[], {}, True, float("nan"), b"7", [[7]], ["7", None], np.zeros((2, 2)), object()],
    "math_answer": [[3, 4], {}, True, float("nan"), b"7", 1j, "", "$", np.zeros((2, 2)), object()],
}


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")

    __str__ = __repr__


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_loses_its_own_value_and_says_why(name):
    made = {"numeric_answer": numeric_answer, "exact_answer": exact_answer}.get(name)
    if made is None:
        pytest.importorskip("math_verify")
        made = lambda: math_answer(workers=1, seconds=60)  # noqa: E731
    odd = [*ODD[name], Unspeakable()]
    rows = [row("7", answer="7"), *(row("7", answer=one) for one in odd), row("7", other=7), row("8", answer="7")]
    table = reward_table([made()], rows)
    values = table.values_BSF[:, 0, 0]
    assert values[0] == 1 and values[-1] == 0 and values[1:-1].isnan().all()
    assert table.lost == {(name, Cause.RAISED): len(odd) + 1}
    for at, one in enumerate(odd, 1):
        said = table.missing[0, at, 0].message
        assert "is not understood" in said or "; the column 'answer' holds " in said, one
    assert "the column 'answer' holds <a Unspeakable whose repr() raises RuntimeError>" in said
    assert "the row has no column 'answer'; it has: other" in table.missing[0, len(odd) + 1, 0].message


def test_a_row_without_a_right_answer_is_not_applicable():
    table = reward_table([numeric_answer(), exact_answer()], [row("7", answer=None)])
    assert set(table.lost) == {("numeric_answer", Cause.NONE), ("exact_answer", Cause.NONE)}


def test_lists_and_arrays_of_right_answers():
    for right in (["no", "yes"], ("yes",), {"yes"}, np.array(["no", "yes"])):
        assert reward_table([exact_answer()], [row("Yes", answer=right)]).values_BSF.item() == 1


# ---------------------------------------------------------------------------------------------- final answers


@each(
    ("text", "boxes"),
    [
        (r"\boxed{3} no wait, \boxed{5}", ["5"]),
        (r"\boxed{2}, \boxed{3} and $\boxed{4}$", ["2", "3", "4"]),
        (r"\boxed{\fbox{3}}", ["3"]),
        (r"\boxed{\frac{1}{2}} \boxed{}", [r"\frac{1}{2}"]),
        (r"\boxed {\{1, 2\}", [r"\{1, 2\}"]),
        ("none", []),
        (r"\boxed{" * 20000 + "3", ["3"]),
    ],
)
def test_the_last_boxes(text, boxes):
    assert last_boxes(text) == boxes


@each(
    ("text", "answer"),
    [
        ("<answer> 3 </answer> thanks, 4 you", "3"),
        ("<answer>2</answer> wait <ANSWER>3</ANSWER> <answer></answer>", "3"),
        (r"<answer>so \boxed{3}</answer> \boxed{4}", "3"),
        ("**Answer:**3", "3"),
        ("The answer is 2. No: the final answer is: 3\nAnything else?", "3"),
        ("#### 3", "3"),
        ("<answer>" * 20000 + "3", "3"),
    ],
)
def test_where_the_final_answer_is(text, answer):
    assert final_answer(text).text.strip() == answer


RIGHT = [
    *[("3", t) for t in ("<answer>3</answer>", "<answer>3 apples</answer>", "Answer:3", "**Answer:**3", "Answer：３")],
    *[
        ("3", t)
        for t in ("答案是3。", "ответ3", "答えは3です", "الجواب٣", "The answer is３", "`3`", "The answer is **3**.")
    ],
    *[
        ("3", t)
        for t in (r"\boxed{5} no wait, \boxed{3}", r"\boxed{\boxed{3}}", r"<answer>\boxed{3}</answer>", r"\[3\]")
    ],
    *[
        ("3", t)
        for t in (r"\boxed{3", r"\fbox{3}", r"\boxed{3} \boxed{}", r"\[3\]", "it is (3)", "x = 3.", "3.0", "**3**.")
    ],
    *[("-3", t) for t in ("−3", "it is −3", "= –3", "答案：－3", r"\boxed{−3}")],
    *[("1234", t) for t in ("1,234", r"\boxed{1,234}", r"\boxed{1{,}234}", r"1\,234", "1.234,00", "1'234")],
    *[
        ("5", t)
        for t in ("$5", r"\$5", "€5", "5 €", r"\boxed{\$5}", "it costs $4, no, $5.", r"\boxed{5\text{ cm}}", "5 cm")
    ],
    *[("25", t) for t in ("25 cm^2", "25 m²", r"\boxed{25\text{ cm}^2}")],
    *[("0.5", t) for t in ("50%", r"\boxed{50\%}", "1/2", "½", r"\frac12", r"so \frac12")],
    *[("3/2", t) for t in ("1.5", "1½", "1 1/2", r"1\frac{1}{2}", r"\boxed{\dfrac{3}{2}}")],
    *[("2000", t) for t in (r"2\times 10^3", "2×10³", "2e3", "2,000")],
    *[("90", t) for t in ("90°", r"90^\circ")],
    *[("1000", t) for t in ("1 000", r"\boxed{1\ 000}", "1 thousand", "#### 1,000", r"\boxed{10^3}")],
    *[("5", t) for t in (r"\boxed{5~\text{cm}}", r"\boxed{\text{5 units}}", "## Answer\n5", r"\boxed 5")],
    *[("[-5,-3]", t) for t in ("[-5, -3]", r"\boxed{x \in [-5,-3]}")],
    *[("2516_8", t) for t in (r"\boxed{2516_8}", r"\boxed{2516_{8}}")],
    *[(r"-\frac{3}{4}", r"\boxed{\frac{-3}{4}}"), ("12:30", "Answer: 12:30."), ("025", "25"), (r"\sqrt[3]{2}", "∛2")],
    *[(r"(-\infty,3]", "(-∞, 3]"), (r"\text{(C)}", r"\boxed{\textbf{C}}"), ("-7", r"\boxed{{-}7}"), ("7", "उत्तर ७ है")],
    *[(r"2\sqrt{3}", t) for t in ("2√3", "2sqrt(3)", r"\sqrt{12}")],
    *[
        (r"\pi", "π"),
        ("B", "The answer is B."),
        ("B", "Answer: (B)"),
        ("yes", "yes"),
        ("(1,2)", "<answer>(1, 2)</answer>"),
    ],
    *[("{1,2}", "{2, 1}"), ("3,4", r"\boxed{3}, \boxed{4}"), ("1e3", "1000"), ("x^2+1", "The answer is 1 + x^2.")],
]
WRONG = [("3", r"\boxed{3} no wait, \boxed{5}"), ("3", r"\boxed{3} or \boxed{5}"), ("7", "<answer>8</answer> 7")]
WRONG += [("1/2", "-1/2"), ("12", r"\boxed{1}\boxed{2}"), ("3", ""), ("3", "three"), ("B", "(C)"), ("11", "1,1")]
WRONG += [("2516_8", r"\boxed{2516_9}"), ("[2,3]", "(2,3)"), ("1 million", "1"), ("3:2", "2:3"), ("[-5,-3]", "[-5,3]")]


def test_what_is_right_earns_1_and_what_is_wrong_0():
    pytest.importorskip("math_verify")
    verifier = MathVerifier(workers=1, seconds=60)
    values = verifier.verify(RIGHT + WRONG)
    verifier.close()
    assert [pair for pair, value in zip(RIGHT, values) if value != 1] == []
    assert [pair for pair, value in zip(WRONG, values[len(RIGHT) :]) if value != 0] == []
