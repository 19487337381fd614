r"""Finds a text's final answer, and parses the ways in which people and models write numbers. Nothing is evaluated."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

# ---------------------------------------------------------------------------------------------- one way of writing

_ONE_FOR = dict.fromkeys("−–‐‑‒﹣－", "-")  # minus signs, hyphens, dashes
_ONE_FOR |= {"×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "∕": "/", "。": ". ", "、": ", ", "٫": ".", "٬": ","}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+"))
_EXPONENT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_BESIDE_WORDS = re.compile(r"(?<=[^\W\d_a-zA-Z])(?=[-+.]?\d)|(?<=\d)(?=[^\W\d_a-zA-Z])")
_LATIN_BESIDE = re.compile(r"(?<=[A-Za-z])(?=[^\x00-\x7f])(?=[\d−－])")
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!\d|,\d)|\d{1,2}(?:,\d{2}){1,12},\d{3}(?!\d|,\d)|\d+)"  # 1,234,567; 12,34,567
_DECIMAL = rf"{_DIGITS}(?:\.\d+)?"
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,;:! ]|['’_\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACED = re.compile(r"(?<![\w.,/:-])(?<!\d )([1-9]\d{0,2}(?: \d{3}){1,12})(?! ?[\d/:-])(?:,(\d{1,2})(?!\d|,\d))?")
_POINTS = re.compile(
    r"(?<![\w.,])\d+(?:\.\d+){2,}(?:,\d+)?|(?<![\d.,])\d{1,3}\.\d{3},\d{1,2}(?!\d|[.,]\d)"
    r"|(?<![\d.,])\d+,\d{1,2}(?=\s?[%€])"
)
_RANGE = re.compile(r"(?<=[\d%°])(?:[–—‒−](?=[-−])|-(?=−))|(?<![\w)])([-−]\d{1,9}(?:\.\d{1,9})?)-(?=-\d)")
_SIGN = re.compile(r"\\?(?:text)?\{-\}(?=\d)|-\\[,;:! ]\s?(?=\d)|(?<=[=($:≈])( ?)- (?=[\d.])")
_FRACTION = r"(?:\\[dtcs]?frac\s*(?:\{\s*(-?[\d.,]{1,99})\s*\}|(\d))\s*(?:\{\s*(-?[\d.,]{1,99})\s*\}|(\d)))"
_LATEX_FRACTION = re.compile(_FRACTION + r"|\{\s*(-?\d[\d.,]{0,99})\s*\\over\s*(-?\d[\d.,]{0,99})\s*\}")
_MIXED = re.compile(r"(?<![\d./,])(\d{1,9})(?:\s+(\d{1,9})/(\d{1,9})(?![\d/])|" + _FRACTION + ")")
_SCIENTIFIC = re.compile(
    rf"(?<![\w.,])({_DECIMAL})"
    r"(?:\s*(?:\*|\\times|\\cdot|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3})(?!\d))"
    r"|[eE]([-+]?\d{1,3})(?!\d|\.\d))"
)
_SCALES = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
_SCALES |= {"百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8, "兆": 12}
_SCALED = re.compile(
    rf"(?<![\w.,])({_DECIMAL})(?:\s|~|-(?=[a-z]))?(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})s?(?![A-Za-z])\}}?",
    re.IGNORECASE,
)

_LETTERS = {"k": 3, "K": 3, "M": 6, "mn": 6, "B": 9, "bn": 9}
# $5k, but not the mathematics $5k$, $5k + 1$ or $2 m$
_MONEY = re.compile(rf"(?<=[$€£¥])({_DECIMAL})({'|'.join(_LETTERS)})(?!\w| ?[$^*/=_\\({{+-])")
_HEX = re.compile(r"(?<![\w.])0x([0-9a-fA-F]{1,15})(?!\w)")


def plain(text: str) -> str:
    """Normalises how a text writes numbers: ASCII digits and signs, "3/4" for "¾", "m^{2}" for "m²", "1234" for
    "1'234", "1 234" and "1{,}234", "2000" for "2×10³" and "2 thousand", "7/4" for "1 3/4", "3" for the version "1.2.3",
    and a space between a number and a word of another script."""
    text = _THOUSANDS.sub("", text)
    text = _SPACED.sub(lambda m: m[1].replace(" ", "") + (f".{m[2]}" if m[2] else ""), text)
    text = _RANGE.sub(lambda m: f"{m[1] or ''} ", text)
    if not text.isascii():
        text = _LATIN_BESIDE.sub(" ", text)
        text = _EXPONENT.sub(lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
        text = "".join(c if c.isascii() else _ascii(c) for c in text)
    text = _POINTS.sub(lambda m: _points(m[0]), text)
    text = _SIGN.sub(lambda m: f"{m[1] or ''}-", text)
    text = _MONEY.sub(lambda m: _written_out(m[1], _LETTERS[m[2]]), text)
    text = _HEX.sub(lambda m: str(int(m[1], 16)), text)
    text = _MIXED.sub(_improper, text)
    text = _SCIENTIFIC.sub(lambda m: _written_out(m[1], int(m[2] or m[3] or m[4])), text)
    text = _SCALED.sub(lambda m: _written_out(m[1], _SCALES[m[2].lower()]), text)
    return text if text.isascii() else _BESIDE_WORDS.sub(" ", text)


def _improper(match: re.Match[str]) -> str:
    parts = [group for group in match.groups() if group is not None]
    if not all(part.isdigit() for part in parts):
        return match[0]
    whole, above, below = map(int, parts)
    return f"{whole * below + above}/{below}" if above < below else match[0]


def _points(digits: str) -> str:
    """ "1234567.8" for the continental "1.234.567,8", "12.5" for "12,5"; the last part of a version or a date."""
    whole, _, rest = digits.partition(",")
    first, *groups = whole.split(".")
    if not groups or (len(first) < 4 and all(len(group) == 3 for group in groups)):
        return first + "".join(groups) + (f".{rest}" if rest else "")
    return groups[-1] + (f",{rest}" if rest else "")


def _written_out(digits: str, power: int) -> str:
    number = f"{digits.replace(',', '')}e{power}"
    return number if abs(power) > 99 else format(Decimal(number), "f")


def _ascii(character: str) -> str:
    if character in _ONE_FOR:
        return _ONE_FOR[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    kind = unicodedata.decomposition(character).partition(">")[0]
    if kind == "<fraction":
        value = Fraction(unicodedata.numeric(character)).limit_denominator(10)
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    same = unicodedata.normalize("NFKC", character)  # full-width forms, circled digits, wide and narrow spaces
    return f"_{{{same}}}" if kind == "<sub" else same if same.isascii() else character


# ---------------------------------------------------------------------------------------------- numbers

_NUMBER = re.compile(
    rf"(?P<sign>[-+](?=[\d.$€£¥₹\\]))?(?:\\?[$€£¥₹]\s?)?(?P<size>{_DECIMAL}(?:e-?\d{{3}}(?!\d))?|(?<![\w.])\.\d+)"
    rf"(?:(?:\^|\*\*)\{{?(?P<power>-?\d{{1,3}})\}}?|\s?/\s?(?P<below>-?{_DECIMAL}))?\s?(?P<percent>\\?%|per\s?cent\b)?"
)
_DATE = re.compile(r"(?<![\d/])\d+(?:/\d+)+/(?=\d)")


@dataclass(frozen=True)
class Number:
    """A number in a text. percent: a percent sign follows; the value is the number before it."""

    value: float
    percent: bool = False

    def equals(self, other: Number, tolerance: float) -> bool:
        """Equality up to a tolerance that is relative, and absolute near 0. 50 % equals both 50 and 0.5."""
        pairs = [(self.value, other.value)]
        if self.percent != other.percent:
            one, share = (other, self) if self.percent else (self, other)
            pairs.append((one.value, share.value / 100))
        return any(math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) for a, b in pairs)


def last_number(text: str) -> Number | None:
    """The last number of a text: "1,234.5", "-3", "2e-3", "3/4", "50 %", "-$5", "2 million"; None without one.

    A hyphen after a digit, a word or a bracket is not a sign ("3-5", "2023-12"). Exponents of units ("m^2") are
    ignored. Digits inside words ("H2O") count only if there is no other number.
    """
    text = _LATEX_FRACTION.sub(lambda m: "/".join(part.replace(",", "") for part in m.groups() if part), plain(text))
    text = _DATE.sub("", text)
    found, inside = None, None
    for match in _NUMBER.finditer(text):
        before = text[max(match.start() - 3, 0) : match.start()]
        if re.search(r"\^\{?[-+]?$", before):
            continue
        if match["sign"] is None and re.search(r"[A-Za-z]$|_\{?$", before):
            inside = _number(match, before)
        else:
            found = _number(match, before)
    return found or inside


def _number(match: re.Match[str], before: str) -> Number:
    value = float(match["size"].replace(",", ""))
    try:
        if match["power"]:
            value **= int(match["power"])
        elif match["below"]:
            value /= float(match["below"].replace(",", ""))
    except (ZeroDivisionError, OverflowError):
        value = math.inf
    negative = match["sign"] == "-" and not re.search(r"(?:[^\W_]|[)\]}%°-])\$?$", before)
    return Number(-value if negative else value, match["percent"] is not None)


# ---------------------------------------------------------------------------------------------- final answers

_TAG = re.compile(r"<answer>((?:[^<]|<(?!/?answer>))*)", re.IGNORECASE)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(r"[\s,;$]*(?:and|or)?[\s,;$]*", re.IGNORECASE)
_SAID = re.compile(r"\banswer\W{0,3}\s*(?:is\b|[:=])[\s:*]*|####\s*", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|(?:as|be|if|in|is|it|of|or|so|to|we)\b)")


@dataclass(frozen=True)
class Answer:
    """A final answer: its text, the readings to try with a parser of mathematics, and a last resort if none parses."""

    text: str
    readings: list[str]
    last_resort: str = ""


def final_answer(text: str) -> Answer:
    r"""The final answer of a text. First the text is cut to the last <answer>, if any. Then the answer is the last
    \boxed{} (or a list, "\boxed{2}, \boxed{3}"), else, without a tag, the text after "answer is", "Answer:" or "####",
    else the whole text, from which the parser takes the last expression."""
    text = _mathematical(text)
    tagged = [inside for inside in _TAG.findall(text) if inside.strip()]
    text = (tagged[-1] if tagged else text).rstrip()
    if boxes := last_boxes(text):
        return Answer(", ".join(boxes), [",".join(f"\\boxed{{{box}}}" for box in boxes)])
    if not tagged and (said := [m.end() for m in _SAID.finditer(text) if m.end() < len(text)]):
        text = text[said[-1] :].strip().split("\n")[0]
    text = text.strip().removesuffix(".")
    number = last_number(text)
    bare = len(text) <= 200 and "$" not in text and not _WORD.search(text)
    return Answer(text, [f"${text}$", text] if bare else [text], repr(number.value) if number else "")


def right_answer(text: str) -> Answer:
    """The readings of a right answer. It contains nothing but the answer, so a bare text is read as a whole."""
    text = _mathematical(text)
    marked = "$" in text or "\\boxed" in text
    return Answer(text, [text] if marked else [f"${text}$", text])


def last_boxes(text: str) -> list[str]:
    r"""The content of the last \boxed{} of a text, and of the boxes before it that only "," or "and" separates from it.
    Of nested boxes the inner content counts; an unclosed box extends to the end of the text."""
    open_braces: list[tuple[bool, int, int]] = []  # (is a box, begin of the box, begin of its content)
    boxes: list[tuple[int, int, str]] = []

    def close(end: int) -> None:
        is_box, begin, inside = open_braces.pop()
        if is_box and boxes and boxes[-1][0] >= inside:
            boxes[-1] = (begin, end + 1, boxes[-1][2])
        elif is_box and text[inside:end].strip():
            boxes.append((begin, end + 1, text[inside:end]))

    for token in _BRACE.finditer(text):
        if token[0] == "}" and open_braces:
            close(token.start())
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token[0] != "{", token.start(), token.end()))
    while open_braces:
        close(len(text))
    chosen = boxes[-1:]
    for before in reversed(boxes[:-1]):
        if not _BETWEEN.fullmatch(text[before[1] : chosen[0][0]]):
            break
        chosen.insert(0, before)
    return [inside for _, _, inside in chosen]


def _mathematical(text: str) -> str:
    """`plain`, plus mathematical symbols as LaTeX, without markup."""
    text = plain(text)
    text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])|`", " ", text)
    text = re.sub(r"(?<=[^\W\d_]):(?=\S)", ": ", text)
    text = re.sub(r"\\?\$(?=\d[\d,]*(?:\.\d+)?(?:[\s,;!?)}]*$|[\s,;!?.)]+[A-Za-z]))", "", text, flags=re.MULTILINE)
    text = re.sub(r"√\s*(\d+)|(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)", lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"π|(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"([∛∜])\s*(\d+|\([^()]*\))", lambda m: f"\\sqrt[{'43'[m[1] == '∛']}]{{{m[2]}}}", text)
    text = re.sub(r"\\text\s*\{\s*(-?\d[\d.,]*)\s*([^{}]*)\}", r"\1\\text{ \2}", text)  # \text{5 cm}
    return text.replace("∞", r"\infty ").replace("~", " ")


def bases(text: str) -> list[str]:
    """The bases of the numbers in an answer: ["8"] for "2516_8" and "2516_{8}"."""
    return re.findall(r"(?<=\d)_\{?(\d+)", text)


def same_text(first: str, second: str) -> bool:
    """Whether answers are equal up to case, white space, $, \\text{}, a final point and brackets around a letter."""
    return bool(_bare(first)) and _bare(first) == _bare(second)


def _bare(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", plain(text))
    text = re.sub(r"[\s$]|\\[()\[\]]", "", text).casefold().removesuffix(".")
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text
