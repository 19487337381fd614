"""Templates against the golden layouts, and what must hold of every one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff import UnifiedModel, families
from unidiff.families.dimoo import Dimoo
from unidiff.families.llada import Llada
from unidiff.families.mmada import Mmada
from unidiff.families.mmada_parallel import ParallelA, ParallelM
from unidiff.images import grid
from unidiff.images.preprocess import Preprocess
from unidiff.spec import ModelSpec
from unidiff.templates import AnswerTagTemplates, Guided, Layout, Picture, Role, TaskTokenTemplates

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "templates.json").read_text())
CASES = {case["id"]: case for case in GOLDEN["cases"]}

LLADA = {"eos": 126081, "start_header": 126346, "end_header": 126347, "eot": 126348}
SPECIAL: dict[str, dict[str, int]] = {"llada": LLADA}
SPECIAL["mmada"] = LLADA | {"t2i": 126088, "mmu": 126089, "ipad": 126093, "r2i": 126094}
SPECIAL["parallel_m"] = SPECIAL["mmada"] | {"interleave": 126095}
SPECIAL["dimoo"] = LLADA | {"filler": 126339, "uncondition": 126351, "answer_start": 126354, "answer_end": 126355}
SPECIAL["dimoo"] |= {"system_start": 126341, "system_end": 126342, "user_start": 126343, "user_end": 126344}
SPECIAL["parallel_a"] = SPECIAL["dimoo"]


def spec_of(family: str) -> ModelSpec:
    tags = family in ("dimoo", "parallel_a")
    begin, end = (126349, 126350) if tags else (126084, 126085)
    offset = 126356 if tags else 126349
    return ModelSpec(
        family="mmada_parallel" if family.startswith("parallel") else family,
        mask=126336,
        pad=126081,
        bos=126080,
        text_end=(126355 if tags else 126348, begin),
        image_next=begin,
        image_begin=(begin,),
        image_end=(end,),
        text_range=(0, offset),
        image_offset=offset,
        codebook_size=8192,
        logit_rows=offset + 8192,
        image_grid=(32, 32),
        text_length=256,
        max_positions=4096,
        row_separator=126084 if tags else None,
        special=SPECIAL[family],
    )


def plain(family: str):
    """What templates are given: the stub tokenizer of the golden data, in which a special token is no more than its
    characters."""
    written = tokenize(family)
    return lambda text: [i for part in re.split(r"(?<=<)|(?=>)", text) for i in written(part)]


def tokenize(family: str):
    """The stub tokenizer of the golden data: special tokens and line breaks first, then words, then signs.

    Words that it does not know (those of system prompts) get an id by length."""
    table = GOLDEN["tokenizers"]["dimoo" if family in ("dimoo", "parallel_a") else "mmada"]
    marks = sorted((w for w in table if w[0] in "<\n"), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, marks), r"\w+", r"[^\w\s]"]))
    return lambda text: [table.get(word, 2000 + len(word)) for word in pattern.findall(text)]


CLASSES = {"llada": Llada, "mmada": Mmada, "parallel_m": ParallelM, "dimoo": Dimoo, "parallel_a": ParallelA}


def made(family: str, prefix: int = 513) -> Any:
    own = CLASSES[family]().templates(spec_of(family), plain(family))
    return replace(own, prefix=prefix) if isinstance(own, TaskTokenTemplates) else own


def picture(given: dict[str, Any]) -> Picture:
    return Picture(tuple(given["codes"]), tuple(given["grid"]))


def square(codes: list[int | None]) -> Picture:
    side = round(len(codes) ** 0.5)
    return Picture(tuple(codes), (side, side))


def build(case: dict[str, Any]) -> Layout:
    """A golden case through the public templates."""
    family, task, inputs = case["family"], case["task"], case["inputs"]
    own = made(family, inputs.get("prefix_len", 513))
    if "<|" in inputs.get("text", ""):  # written with special tokens: that is what ids are for
        inputs = {**inputs, "text": inputs["text_ids"]}
    return {"llada": _llada, "mmada": _mmada, "parallel_m": _parallel_m}.get(family, _tagged)(own, task, inputs)


def _llada(own: Any, task: str, inputs: dict[str, Any]) -> Layout:
    if task == "lm_chat":
        return own.chat(inputs["user_text"], inputs["gen_length"]).conditional
    return own.text(inputs["text"], inputs["gen_length"], inputs.get("pad_to_prompt_length")).conditional


def _mmada(own: TaskTokenTemplates, task: str, inputs: dict[str, Any]) -> Layout:
    if task.startswith("t2i"):
        codes = inputs.get("image_codes_partial", [None] * inputs["num_image_tokens"])
        guided = own.text_to_image(inputs["text"], square(codes))
        return guided.unconditional["text"] if "uncond" in task else guided.conditional
    if task == "mmu":
        own = replace(own, markup=replace(own.markup, gap="\n\n"))
        return own.understand(inputs["user_text"], [square(inputs["image_codes"])], inputs["gen_length"]).conditional
    if task in ("mmu_train", "r2i"):
        train = own.train_understand if task == "mmu_train" else own.train_reason
        return train(inputs["text"], square(inputs["image_codes"]), inputs["max_text_len"])
    return (own.train_text if task == "lm" else own.train_chat)(inputs["text"], inputs["max_seq_len"])


def _parallel_m(own: TaskTokenTemplates, task: str, inputs: dict[str, Any]) -> Layout:
    given = square(inputs.get("image_codes", [0] * inputs["num_image_tokens"]))
    guided = own.parallel(inputs["text"], given, Picture.blank(*given.grid), inputs["text_len"])
    return guided.unconditional["prompt"] if "uncond" in task else guided.conditional


def _tagged(own: AnswerTagTemplates, task: str, inputs: dict[str, Any]) -> Layout:
    given = [picture(image) for image in inputs.get("input_images", [])]
    user, system = inputs.get("user_text", "a red cube"), inputs["system_text"]
    if task == "mmu":
        return own.understand(user, given, inputs["gen_length"], system).conditional
    output = Picture.blank(*inputs["grid"])
    if task == "inpaint":
        keep = torch.tensor(inputs["keep"]).bool().view(*inputs["grid"])
        output = Picture(tuple(inputs["image_codes"]), tuple(inputs["grid"])).edited(~keep)
    if task.startswith("ti2ti"):
        guided = own.parallel(user, given, output, inputs["text_len"], system)
    elif task.startswith("i2i"):
        guided = own.edit(user, given, output, system)
    else:
        guided = own.text_to_image(user, output, system)
    if "uncond" not in task:
        return guided.conditional
    return guided.unconditional["image" if task.endswith("_image") else "text"]


@each("name", CASES)
def test_golden(name):
    case = CASES[name]
    layout, expected = build(case), case["expected"]
    assert list(layout.ids) == expected["input_ids"]
    assert len(layout) == expected["length"]
    roles = {"text": (Role.TEXT,), "image": (Role.IMAGE,), "all": ()}
    for group, places in expected["targets"].items():
        assert layout.targets(*roles[group]) == places
    assert len(layout.targets()) == sum(map(len, expected["targets"].values()))
    assert list(layout.valid) == [bool(x) for x in expected["attention_mask"] or [1] * len(layout)]
    if "prompt_mask" in expected:
        assert [not hit for hit in layout.target] == [bool(x) for x in expected["prompt_mask"]]
    if "row_separator_positions" in expected:
        assert [i for i, x in enumerate(layout.ids) if x == 126084] == expected["row_separator_positions"]
    if "image_start" in expected:
        drawn = [s for s in range(layout.segments) if layout.role[layout.places(s)[0]] is Role.IMAGE]
        assert expected["image_start"] in [layout.places(s)[0] for s in drawn]


def test_every_golden_case_is_tested():
    families = {case["family"] for case in GOLDEN["cases"]}
    assert len(CASES) == len(GOLDEN["cases"]) == 45 and families == set(SPECIAL)


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided_layouts() -> dict[str, Guided]:
    dog, blank = Picture((5, 6, 7, 8, 9, 10), (2, 3)), Picture.blank(2, 3)
    known = dog.edited(torch.tensor([[True, False, False], [False, False, True]]))
    found = {}
    for family in ("mmada", "parallel_m"):
        own = made(family, 20)
        found[f"{family} t2i"] = own.text_to_image("a red cube", blank)
        found[f"{family} inpaint"] = own.text_to_image("a red cube", known)
        found[f"{family} reason"] = own.reason_then_image("a red cube", known, 20)
        found[f"{family} understand"] = own.understand("what is it ?", [dog], 4)
    found["parallel_m parallel"] = made("parallel_m").parallel("make it red", dog, known, 5)
    for family in ("dimoo", "parallel_a"):
        own = made(family)
        found[f"{family} t2i"] = own.text_to_image("a red cube", blank)
        found[f"{family} edit"] = own.edit("make it red", [dog, dog], known)
    found["parallel_a parallel"] = made("parallel_a").parallel("make it red", [dog], known, 5)
    response = ["it is left", known, 4]
    rounds = {name: made(name).interleaved(["move", dog], response) for name in SPECIAL if name != "llada"}
    return found | {f"{name} interleaved": guided for name, guided in rounds.items()}


@each(("name", "guided"), guided_layouts().items())
def test_guidance_has_the_same_targets_and_another_prompt(name, guided):
    wanted = guided.conditional
    assert guided.unconditional
    for other in guided.unconditional.values():
        pairs = list(zip(wanted.targets(), other.targets(), strict=True))
        assert pairs and all(wanted.role[a] == other.role[b] and wanted.ids[a] == other.ids[b] for a, b in pairs)
        assert other.ids != wanted.ids


def test_guidance_refuses_other_targets():
    own = made("dimoo").ids
    with pytest.raises(ValueError, match="guidance 'text': 3 targets, the conditional has 2"):
        Guided(own.hole(2), {"text": own.hole(3)})


def test_masked_prompt_of_text_guidance():
    guided = made("llada").text("a blue ball", 2)
    assert guided.unconditional["prompt"].ids == (126336,) * 5
    assert guided.conditional.targets() == guided.unconditional["prompt"].targets() == [3, 4]


# --- edits ------------------------------------------------------------------------------------------------------------


@each("family", ["mmada", "parallel_m", "dimoo", "parallel_a"])
def test_an_edit_masks_its_cells_and_no_separator(family):
    dog = Picture(tuple(range(100, 124)), (4, 6))
    mask = grid.from_box((16, 20, 40, 40), (64, 96), 16)  # pixels: rows 1 and 2, columns 1 and 2
    own, edited = made(family), dog.edited(mask)
    if family in ("mmada", "parallel_m"):
        before, after = (own.text_to_image("make it red", x).conditional for x in (dog, edited))
    else:
        before, after = (own.edit("make it red", [dog], x).conditional for x in (dog, edited))
    changed = [i for i, (a, b) in enumerate(zip(before.ids, after.ids, strict=True)) if a != b]
    assert changed == after.targets() == after.targets(Role.IMAGE) and before.targets() == []
    assert all(after.ids[i] == own.ids.mask for i in changed)
    cells = after.places(after.segments - 1)
    assert [cells.index(i) for i in changed] == [7, 8, 13, 14]
    separators = [i for i, x in enumerate(after.ids) if x == own.ids.row_separator]
    assert len(separators) == (8 if family in ("dimoo", "parallel_a") else 0)
    assert all(after.role[i] is Role.MARK and not after.target[i] for i in separators)


def test_picture_checks():
    assert Picture.of(torch.tensor([[1, 2, 3]])) == Picture((1, 2, 3), (1, 3))
    with pytest.raises(ValueError, match=r"3 cells do not fill a grid of \(2, 2\)"):
        Picture((1, 2, 3), (2, 2))
    with pytest.raises(ValueError, match=r"mask is \[3, 2\], the picture's grid \[2, 3\]"):
        Picture.blank(2, 3).edited(torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"codes: expected \[rows, columns\]"):
        Picture.of(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"codes \[126349\] are not in 0 to 8191"):
        made("mmada").text_to_image("a", Picture((126349,), (1, 1)))


# --- interleaved ------------------------------------------------------------------------------------------------------

DOG, HOLE = Picture((7, 8), (1, 2)), Picture((7, None), (1, 2))


def test_interleaved_with_a_task_token():
    own = made("mmada")
    layout = own.interleaved([DOG, "move it", DOG, "left"], ["move it", HOLE, 3]).conditional
    soi, eoi, code, mask = 126084, 126085, 126349, 126336
    image = [soi, code + 7, code + 8, eoi]
    chat = tokenize("mmada")
    assert list(layout.ids) == [
        *[126094, *image, *chat("<|startoftext|><|start_header_id|>user<|end_header_id|>\nmove it"), *image],
        *chat("left<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"),
        *[*chat("move it"), soi, code + 7, mask, eoi, mask, mask, mask],
    ]
    assert [layout.ids[i] for i in layout.targets()] == [mask] * 4 and layout.segments == 7
    # the begin-of-image is the text's own last token
    assert layout.role[layout.ids.index(mask) - 2] is Role.TEXT


def test_interleaved_with_answer_tags():
    own = made("dimoo")
    boi, eoi, code, mask, nl = 126349, 126350, 126356, 126336, 126084
    words = tokenize("dimoo")
    prompt = words("<system>say words</system><user>move it")
    image = [boi, code + 7, code + 8, nl, eoi]
    layout = own.interleaved(["move it", DOG], ["it", HOLE, "it is left"], "say words").conditional
    assert list(layout.ids) == [
        *[*prompt, *image, *words("</user><answer>it"), boi, code + 7, mask, nl, eoi],
        *words("it is left</answer>"),
    ]
    texts = {"text": words("<user><uncondition>"), "image": words("<user>move it</user>")}
    for name, other in own.interleaved(["move it", DOG], ["it", HOLE], "say words").unconditional.items():
        start = other.ids.index(words("<user>")[0])
        assert list(other.ids[start : start + len(texts[name])]) == texts[name]
        assert (code + 8 in other.ids) == (name == "text")
    open_end = own.interleaved(["move it"], ["it", HOLE, 3], "say words")
    assert list(open_end.conditional.ids[-4:]) == [mask, mask, mask, 126355] and set(open_end.unconditional) == {"text"}


def test_interleaved_rounds_extend_one_another():
    """What was sampled is the head of the next round: nothing that a model has read changes."""
    for family in ("mmada", "parallel_m", "dimoo", "parallel_a"):
        own, closed = made(family), len(tokenize(family)("</answer>")) if family in ("dimoo", "parallel_a") else 0
        done: list[Any] = []
        before: tuple[int, ...] = ()
        for part in ([*tokenize(family)("move it"), own.ids.image_next], DOG, tokenize(family)("left"), DOG):
            done.append(part)
            ids = own.interleaved(["move"], done).conditional.ids
            ids = ids[: len(ids) - closed]
            assert ids[: len(before)] == before and len(ids) > len(before)
            before = ids


def test_nothing_to_respond():
    with pytest.raises(ValueError, match="response: expected at least one"):
        made("mmada").interleaved(["move"], [])
    with pytest.raises(ValueError, match="needs at least one token, got 0"):
        made("dimoo").interleaved(["move"], [0])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_reasoning_fills_the_area_that_was_trained():
    own = made("mmada")
    layout = own.reason_then_image("a red cube", Picture.blank(2, 2), 20).conditional
    train = own.train_reason("a red cube", square([1, 2, 3, 4]), 20)
    assert len(layout) == len(train) and layout.ids[-6] == train.ids[-6] == 126084
    assert len(layout.targets(Role.TEXT)) == 20 - len(made("mmada").chat("a red cube", 1).conditional.ids) + 1
    with pytest.raises(ValueError, match="area: the prompt's 13 tokens leave no room for reasoning in 13"):
        own.reason_then_image("a red cube", Picture.blank(2, 2), 13)


def test_answers_are_filled_up():
    own = made("dimoo")
    layout = own.train_understand("what is it ?", [DOG], "a red cube", 6)
    assert [layout.ids[i] for i in layout.targets()] == [1014, 1021, 1035, 126355, 126339, 126339]
    cut = own.train_understand("what is it ?", [DOG], "a red cube", 3)
    assert [cut.ids[i] for i in cut.targets()] == [1014, 1021, 126355]


def test_turns_of_a_chat():
    turns = [("user", "a ball"), ("assistant", "blue"), ("user", "what ?")]
    assert made("llada").chat(turns, 1).conditional.ids.count(126348) == 3
    ours, theirs = (made(family).chat(turns, 1).conditional.ids for family in ("mmada", "llada"))
    assert ours == tuple(1259 if i == 1252 else i for i in theirs) and 1252 in theirs  # one line break, not two


def test_a_prompt_longer_than_its_place():
    with pytest.raises(ValueError, match="prompt_length is 2, the prompt has 3 tokens"):
        made("llada").text("a blue ball", 2, prompt_length=2)


def test_the_family_s_own():
    assert all("default" in CLASSES[family].preprocessing for family in set(SPECIAL) - {"llada"})
    assert made("mmada").prefix == 513 and made("mmada").markup.gap == "\n"
    assert made("parallel_a").systems["parallel"] == made("dimoo").systems["edit"]
    with pytest.raises(ValueError, match="no system prompt for parallel"):
        made("dimoo").parallel("make it red", [DOG], HOLE, 3)
    with pytest.raises(ValueError, match="was not trained on text and picture in parallel"):
        made("mmada").parallel("make it red", DOG, HOLE, 3)
    with pytest.raises(ValueError, match="at least one picture; without one the task is text_to_image"):
        made("dimoo").edit("make it red", [], HOLE)
    assert len(made("dimoo").understand("what is it ?", [], 4).conditional.targets()) == 4  # no picture: text alone


def test_tokenizers_that_are_not_the_family_s():
    with pytest.raises(ValueError, match=r"need the special token 'ipad'"):
        Mmada().templates(replace(spec_of("mmada"), special=LLADA), tokenize("mmada"))
    with pytest.raises(ValueError, match=r"need the special token 'user_end'"):
        left = {k: v for k, v in SPECIAL["dimoo"].items() if k != "user_end"}
        Dimoo().templates(replace(spec_of("dimoo"), special=left), plain("dimoo"))


@each("family", SPECIAL)
def test_words_write_no_special_token(family):
    """A mark in what a user says is characters: the layout has the special tokens of any other words, no more."""
    words = " ".join(w for w in GOLDEN["tokenizers"]["dimoo" if "row" in family else "mmada"] if w[0] == "<")
    own, marks = made(family), set(SPECIAL[family].values()) | spec_of(family).special_ids

    def special(said: str) -> list[int]:
        layouts = [own.prompt([said]) if family == "llada" else own.interleaved([said], [said, 2]).conditional]
        layouts = [own.prompt([said, DOG, said])] if family != "llada" else layouts
        ids = [i for layout in layouts for s in layout for i in s.tokens.tolist()]
        return [i for i in ids if i in marks]

    assert special(words) == special("a red cube") != []


def test_turns_to_train_on_are_those_of_the_golden_text():
    case = CASES["mmada_lm_chat_0"]["inputs"]
    own = made("mmada")
    assert own.turns(("user", "a blue ball"), ("assistant", "blue")) == tuple(case["text_ids"])
    assert own.turns(("user", "<|eot_id|>")).count(126348) == 1


def test_a_family_derived_from_outside_has_the_template_and_the_preprocessing(published, tmp_path, monkeypatch):
    monkeypatch.setattr(families.registry, "FAMILIES", dict(families.FAMILIES))

    @families.register
    class Mine(Mmada):
        name: ClassVar[str] = "mine"
        preprocessing: ClassVar[dict[str, Preprocess]] = {"default": Preprocess("squash", 32)}

        def detect(self, config: dict[str, Any]) -> bool:
            return False

    theirs = UnifiedModel.from_pretrained(published("mmada"))
    mine = UnifiedModel.from_pretrained(published("mmada"), family="mine")
    mine.save_pretrained(tmp_path / "saved")
    picture = Image.new("RGB", (50, 40), "red")
    for model in (mine, UnifiedModel.from_pretrained(tmp_path / "saved")):
        assert model.spec.family == "mine" and model.prepare(picture).size == (32, 32)
        prompts = [m.encode(["find it", m.prepare(picture).resize((32, 32))]) for m in (model, theirs)]
        assert [s.tokens.tolist() for s in prompts[0]] == [s.tokens.tolist() for s in prompts[1]]
