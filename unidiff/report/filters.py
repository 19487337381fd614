"""Jinja filters for records: columns, tokens, and numbers in words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from unidiff.report.record import RewardRecord, RolloutRecord, SegmentRecord
from unidiff.report.results import number, percent

_LONG_TEXT = 120  # a text with more characters needs a wider column
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")
_LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"  # 0 to 63: a probability in one letter


@dataclass
class Card:
    """One column of a rollout: the prompt, a round (text, then picture), or the answer."""

    heading: str
    segments: list[SegmentRecord]
    given: bool = False

    @property
    def parts(self) -> tuple[list[SegmentRecord], list[SegmentRecord]]:
        """The segments before the first picture, and the rest."""
        at = next((i for i, s in enumerate(self.segments) if s.modality == "image"), len(self.segments))
        return self.segments[:at], self.segments[at:]


@dataclass
class Token:
    """One displayed token of a text, with the spaces around it. step: from 1. doubt: 1 − probability."""

    lead: str
    word: str
    gap: str
    kind: str = ""
    hint: str = ""
    step: int = -1
    percent: int = 100
    doubt: float = 0.0


# ---------------------------------------------------------------- filters: one rollout


def cards(record: RolloutRecord) -> list[Card]:
    """Columns of a rollout. A round begins with a text, or with a picture that follows a picture."""
    rounds: list[Card] = []
    for segment in record.response:
        if not rounds or segment.modality == "text" or rounds[-1].segments[-1].modality == "image":
            rounds.append(Card(f"round {len(rounds) + 1}", []))
        rounds[-1].segments.append(segment)
    if rounds and rounds[-1].segments[-1].modality == "text":
        rounds[-1].heading = "answer"
    return [Card("prompt", list(record.prompt), given=True), *rounds]


def _long_texts(record: RolloutRecord) -> bool:
    return any(len(s.text or "") > _LONG_TEXT for s in record.segments)


def _saving(record: RolloutRecord) -> str:
    """The rollout's cost, and the savings of its edits, in one line."""
    parts = []
    if record.image_tokens:
        parts.append(f"{percent(record.kept_tokens / record.image_tokens)} of picture tokens kept")
    if record.saved is not None:
        parts.append(f"{_difference(-record.saved)} picture token-forwards than regenerated")
    total = record.total
    if not record.compute:
        return " · ".join(parts)
    parts += [f"{number(total['token_forwards'])} token-forwards", _flops(total["flops"])]
    return " · ".join(parts)


def _difference(share: float) -> str:
    """A change as "12 % fewer", "no fewer" or "12 % more"."""
    if abs(share) < 1e-9:
        return "no fewer"
    return f"{percent(abs(share))} {'fewer' if share < 0 else 'more'}"


def _flops(count: float) -> str:
    """1.37 GFLOPs: the prefix is joined to the unit."""
    text = number(count)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


# ---------------------------------------------------------------- filters: one segment


def _token_count(segment: SegmentRecord) -> str:
    """In words: the numbers of denoised and of changed tokens of a picture."""
    n = len(segment.tokens)
    if segment.prompt:
        return f"{n} tokens, given"
    kind = f"all {n} tokens sampled" if segment.edited is None else f"{segment.denoised} of {n} tokens denoised again"
    return kind if segment.changed is None else f"{kind}, {sum(segment.changed)} changed"


def _steered(segment: SegmentRecord) -> str:
    """In words: a schedule's choices by step; "" without a schedule."""
    if segment.choices is None:
        return ""
    counts = " · ".join(str(count) for count, _ in segment.choices)
    said = f"the schedule committed {counts} tokens"
    if any(abs(warmth - 1) > 0.005 for _, warmth in segment.choices):
        said += ", at temperature × " + " · ".join(f"{warmth:.2f}" for _, warmth in segment.choices)
    return said


def _outline(segment: SegmentRecord) -> str:
    """SVG path, in tokens, around the tokens that were denoised again."""
    rows, columns_ = segment.grid or (0, 0)
    edited = segment.edited or []

    def inside(row: int, column: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns_ and edited[row * columns_ + column]

    path = []
    for at in (i for i, e in enumerate(edited) if e):
        row, column = divmod(at, columns_)
        sides = (
            (row - 1, column, f"M{column} {row}h1"),
            (row + 1, column, f"M{column} {row + 1}h1"),
            (row, column - 1, f"M{column} {row}v1"),
            (row, column + 1, f"M{column + 1} {row}v1"),
        )
        path += [edge for r, c, edge in sides if not inside(r, c)]
    return "".join(path)


def _token_data(segment: SegmentRecord) -> str:
    """Each token as "step:percent", or "-" if it was copied or this is unknown."""
    if segment.step is None or segment.probability is None:
        return " ".join("-" for _ in segment.tokens)
    sampled = segment.edited or [True] * len(segment.tokens)
    known = zip(sampled, segment.step, segment.probability)
    return " ".join(f"{step}:{_percent(p)}" if is_sampled else "-" for is_sampled, step, p in known)


def _spoken(segment: SegmentRecord) -> list[Token]:
    """A text's tokens. Spaces are inserted between them unless the tokens contain spaces."""
    words = segment.words or []
    gap = "" if segment.text and segment.text.strip() in "".join(words) else " "
    out = []
    for i, word in enumerate(words):
        bare = word.strip() or word  # a token of only spaces is shown unchanged
        at = word.index(bare)
        token = Token(
            word[:at], bare, word[at + len(bare) :] + gap, kind=" special" if _SPECIAL.fullmatch(bare) else ""
        )
        if not segment.prompt and segment.step is not None and segment.probability is not None:
            step, p = segment.step[i], segment.probability[i]
            token.step, token.percent, token.doubt = step + 1, _percent(p), round(1 - p, 2)
            token.hint = f"set in step {step + 1} of {segment.steps}, probability {p:.2f}" + _drafts(segment, i)
        out.append(token)
    return out


def _read_as(segment: SegmentRecord) -> str:
    """A prompt's text as its tokens decode, if that differs (words that the tokenizer does not know); else ""."""
    if not segment.prompt or segment.text is None or not segment.words:
        return ""
    read = "".join(token.lead + token.word + token.gap for token in _spoken(segment)).strip()
    same = "".join(read.split()) == "".join(segment.text.split())
    return "" if same else read


def _drafts(segment: SegmentRecord, place: int) -> str:
    """The probabilities of a token's drafts, in the steps before it was committed."""
    drafts = [row[place] for row in (segment.trace or [])[: (segment.step or [])[place]]]
    shown = [f"{p:.2f}" for p in drafts if p is not None]
    return f"\ndrafts before: {', '.join(shown)}" if shown else ""


def _percent(probability: float) -> int:
    return round(100 * probability)


# ---------------------------------------------------------------- filters: values


def _tone(reward: RewardRecord) -> str:
    if reward.value is None:
        return "none"
    return "good" if reward.value >= 1 else "bad" if reward.value <= 0 else "part"


def _mark(reward: RewardRecord) -> str:
    return {"good": "✓", "bad": "✗", "part": "◐", "none": "–"}[_tone(reward)]


def _filled(reward: RewardRecord) -> float:
    return 0.0 if reward.value is None else round(min(max(reward.value, 0.0), 1.0), 3)


def _signed_number(value: float) -> str:
    return number(value).replace("-", "−")


def _direction(value: float | None) -> str:
    return ("none", "good", "bad")[_sign(value)]


def _advantage(value: float | None) -> str:
    if value is None:
        return "– none"
    return f"{'●▲▼'[_sign(value)]} {_plain_advantage(value)}"


# ---------------------------------------------------------------- edits, credit and cost


@dataclass
class Edit:
    """One sampled picture of a rollout, its heading, and the previous picture if it has the same grid. A picture of the
    prompt is shown as its tokens decode, because these tokens are copied."""

    heading: str
    segment: SegmentRecord
    before: SegmentRecord | None


@dataclass
class Credit:
    """One segment's advantages by assignment. opposed: assignments with the opposite sign of factorized."""

    label: str
    advantages: dict[str, float | None]
    opposed: set[str]


@dataclass
class Bar:
    """A cost as a bar. length: percent of the longest bar. parts: (phase, percent of this bar)."""

    label: str
    text: str
    length: float
    parts: list[tuple[str, float]]


def edits_of(record: RolloutRecord) -> list[Edit]:
    headings = {id(s): card.heading for card in cards(record) for s in card.segments}
    last: SegmentRecord | None = None
    found = []
    for segment in record.segments:
        if segment.modality != "image" or not segment.picture:
            continue
        if not segment.prompt:
            same = last is not None and last.grid == segment.grid
            before = last and replace(last, picture=last.read or last.picture)
            found.append(Edit(headings[id(segment)], segment, before if same else None))
        last = segment
    return found


def _findings(segment: SegmentRecord) -> list[tuple[str, str]]:
    """Findings about an edit, as (tone, sentence)."""
    n, steps = len(segment.tokens), f"{segment.steps} step{'s' * (segment.steps != 1)}"
    if segment.edited is None:
        return [("none", f"all {n} tokens sampled in {steps}, none kept")]
    if not segment.denoised:
        said = [("none", "no token was masked: the picture is the one before")]
    else:
        said = [("none", f"{segment.denoised} of {n} tokens denoised again in {steps}")]
    if segment.changed is None or segment.strays is None:
        return said  # no previous picture to compare with
    changed = sum(segment.changed) - segment.strays
    if segment.denoised:
        part = {0: "none", segment.denoised: "all"}.get(changed, str(changed))
        rest = f", {segment.denoised - changed} came out as before" if part == str(changed) else ""
        said.append(("none", f"{part} of them changed{rest}"))
    if segment.strays:
        said.append(("bad", f"{segment.strays} of {segment.kept} tokens outside the mask changed: a bug"))
    elif segment.kept:
        which = "all" if segment.kept == n else "the other"
        said.append(("good", f"{which} {segment.kept} tokens are bit-identical"))
    else:
        said.append(("none", "no token was kept"))
    return said


def _corners(segment: SegmentRecord) -> str:
    """SVG path, in tokens, that marks a corner of each changed token."""
    columns = (segment.grid or (0, 1))[1]
    places = [divmod(i, columns) for i, changed in enumerate(segment.changed or []) if changed]
    return "".join(f"M{column} {row}h.3l-.3 .3z" for row, column in places)


def _trace_data(segment: SegmentRecord) -> str:
    """One word per step, with one letter per masked token in order: its probability in 64 levels, A to -."""
    steps = segment.trace or []
    return " ".join("".join(_LEVELS[round(63 * p)] for p in row if p is not None) for row in steps)


def _credits(record: RolloutRecord) -> list[Credit]:
    """Every sampled segment with its advantages; empty where none were compared."""
    rows = []
    for card in cards(record):
        for segment in card.segments:
            if segment.prompt or not segment.advantages:
                continue
            own = segment.advantages.get("factorized")
            opposed = {k for k, v in segment.advantages.items() if _sign(v) * _sign(own) < 0}
            kind = "" if card.heading == "answer" else {"image": " picture"}.get(segment.modality, " text")
            rows.append(Credit(card.heading + kind, segment.advantages, opposed))
    return rows


def _interference(rows: list[Credit]) -> str:
    """A sentence that compares the signs of the advantages under `joint` and under `factorized`."""
    if not any(_sign(v) for row in rows for v in row.advantages.values()):
        return "No assignment pushes anything here: every advantage is 0 or missing."
    if not all({"joint", "factorized"} <= row.advantages.keys() for row in rows):
        return ""
    kinds: dict[str, list[str]] = {"the same way": [], "opposite ways": [], "joint alone": [], "factorized alone": []}
    for row in rows:
        joint, own = _sign(row.advantages["joint"]), _sign(row.advantages["factorized"])
        if joint or own:
            both = "the same way" if joint == own else "opposite ways"
            kinds[both if joint and own else "joint alone" if joint else "factorized alone"].append(row.label)
    said = [
        f"{len(labels)} {kind}" + (f" ({', '.join(labels)})" if kind != "the same way" else "")
        for kind, labels in kinds.items()
        if labels
    ]
    neither = len(rows) - sum(map(len, kinds.values()))
    said += [f"{neither} by neither"] if neither else []
    return f"Segments pushed by joint and factorized: {', '.join(said)}."


def _sign(value: float | None) -> int:
    """-1, 0 or 1; values that are shown as 0.00 count as 0."""
    return 0 if value is None or abs(value) < 0.005 else 1 if value > 0 else -1


def _heat(value: float | None) -> int:
    """The strength of an advantage's colour, in percent."""
    return 0 if value is None else round(min(abs(value) / 2, 1) * 45)


def _plain_advantage(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}".replace("-", "−") if _sign(value) else "0"


def _bars(record: RolloutRecord) -> list[Bar]:
    """FLOPs by phase, of the rollout and with every picture regenerated."""
    sides = [
        ("this rollout", record.compute, record.total),
        ("every picture regenerated", record.full, record.full_total),
    ]
    longest = max(total["flops"] for _, _, total in sides)
    if not record.full or not longest:
        return []
    return [
        Bar(
            label,
            _flops(total["flops"]),
            round(100 * total["flops"] / longest, 2),
            [(phase, round(100 * c["flops"] / total["flops"], 2)) for phase, c in compute.items() if c["flops"]],
        )
        for label, compute, total in sides
    ]


def _less(record: RolloutRecord) -> str:
    """In words: the rollout's FLOPs relative to regenerating every picture."""
    full = record.full_total["flops"]
    share = record.total["flops"] / full - 1 if full else 0.0
    return "the same" if abs(share) < 1e-9 else f"{percent(abs(share))} {'less' if share < 0 else 'more'}"


FILTERS = {"cards": cards, "edits": edits_of} | {
    f.__name__.strip("_"): f
    for f in (
        _long_texts,
        _saving,
        _token_count,
        _steered,
        _outline,
        _token_data,
        _spoken,
        _read_as,
        _tone,
        _mark,
        _filled,
        _signed_number,
        _direction,
        _advantage,
        _findings,
        _corners,
        _trace_data,
        _credits,
        _interference,
        _heat,
        _plain_advantage,
        _bars,
        _less,
        _flops,
        number,
    )
}
