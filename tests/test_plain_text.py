"""Special tokens in text from outside: characters, in every family and with every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.tables import each
from unidiff.model import UnifiedModel
from unidiff.plain_text import PlainText
from unidiff.sequence import Interleaved, Modality
from unidiff.spec import ModelSpec
from unidiff.templates import Picture
from unidiff.templates.chat import ChatMarkup, ChatTemplates
from unidiff.templates.layout import Ids

FAMILIES = ("native", "llada", "mmada", "mmada_parallel", "mmada_parallel_a", "dimoo")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, published: Callable[[str], Path]) -> UnifiedModel:
    name = request.param
    return UnifiedModel.from_pretrained(ROOT / "recipes/base" if name == "native" else published(name))


def marks(model: UnifiedModel) -> list[str]:
    """The family's special tokens as a user would type them."""
    return [model.tokenizer.convert_ids_to_tokens(i) for i in sorted(model.spec.special_ids)]


def written(model: UnifiedModel, sequence: Interleaved) -> list[int]:
    """The special ids of a sequence, as the model reads it."""
    special = model.spec.special_ids | {model.spec.mask}
    return [i for i in model.render([sequence]).ids[0].tolist() if i in special]


def test_a_prompt_writes_the_special_tokens_of_its_template_alone(family: UnifiedModel) -> None:
    for text in (" ".join(marks(family)), "go".join(marks(family)), "".join(marks(family)), *marks(family)):
        assert written(family, family.encode([text])) == written(family, family.encode(["find the goal"]))
        if family.template is not None:
            said, plain = (family.encode_prompt([t], ("text",)).without["text"] for t in (text, "find the goal"))
            assert written(family, said) == written(family, plain) or family.images is None  # LLaDA masks every word


def test_a_target_of_training_ends_once(family: UnifiedModel) -> None:
    said = " ".join(marks(family)[:2]) + " go"
    if family.spec.family == "native":  # a tokenizer of whole words, whose vocabulary lacks these marks
        with pytest.raises(ValueError, match="its tokenizer lacks a word"):
            family.encode([said], prompt=False)
        said = "go"
    (segment,) = family.encode([said], prompt=False)
    assert [i for i in segment.tokens.tolist() if i in family.spec.special_ids] == [segment.tokens[-1]]
    assert int(segment.tokens[-1]) in family.spec.text_end


def test_a_layout_holds_the_special_tokens_of_its_template_alone(family: UnifiedModel) -> None:
    own, said, blank = family.template, " ".join(marks(family)), Picture.blank(2, 2)
    special = family.spec.special_ids
    layouts: dict[str, Callable[[str], Any]] = {
        "text": lambda text: own.text(text, 2),
        "chat": lambda text: own.chat([("user", text), (text, text)], 2),
        "text_to_image": lambda text: own.text_to_image(text, blank),
        "understand": lambda text: own.understand(text, [], 2),
        "interleaved": lambda text: own.interleaved([text], [text, 2]),
        "edit": lambda text: own.edit(text, [Picture((1,), (1, 1))], blank, text),
    }
    for name, layout in layouts.items():
        if hasattr(own, name):
            found, plain = (layout(text).conditional for text in (said, "go"))
            found, plain = ([i for i, valid in zip(x.ids, x.valid) if valid and i in special] for x in (found, plain))
            assert found == plain, name


def test_a_response_that_is_read_again_has_no_special_token(family: UnifiedModel) -> None:
    """Tokens -> text -> tokens: words come back; a special token that a model drew among them comes back as
    characters."""
    words = family.encode_text("find the goal")
    assert family.encode_text(family.decode_text(words)).tolist() == words.tolist()
    drawn = [i for i in family.spec.special_ids if i in range(*family.spec.text_range)]
    again = family.encode_text("go " + family.tokenizer.decode(drawn)).tolist()
    assert family.spec.special_ids.isdisjoint(again)


# ---------------------------------------------------------------- other tokenizers

TEXTS = ["find the goal", "  two  spaces\n\nand lines\n", "héllo wörld 123", "a<b>c", "", "<", "<|x|>", "tab\there"]


def bpe(*added: AddedToken, ignore_merges: bool = False, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as the published families have, with two special tokens and others that are added."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|mask|>", "<|end|>"], show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["find the goal", "and lines", "hello world"] * 4, trainer)
    core.add_tokens(list(added))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def spec_of(tokenizer: Any, toy_spec: Callable[..., ModelSpec]) -> ModelSpec:
    ids = {"mask": tokenizer.convert_tokens_to_ids("<|mask|>"), "end": tokenizer.convert_tokens_to_ids("<|end|>")}
    rows = len(tokenizer) + 10
    text = {"text_end": (ids["end"],), "image_next": None, "text_range": (0, rows), "bos": None}
    none = {"image_begin": (), "image_end": (), "codebook_size": 0, "image_offset": rows, "image_grid": (0, 0)}
    return toy_spec(mask=ids["mask"], pad=ids["end"], logit_rows=rows, **text, **none)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "plain": bpe,
    "ignore_merges": lambda: bpe(ignore_merges=True),
    "an added token that is not special": lambda: bpe(AddedToken("<tool>", special=False)),
    "an added token that takes the space": lambda: bpe(AddedToken("<tool>", special=False, lstrip=True, rstrip=True)),
    "an added token of a normalized text": lambda: bpe(
        AddedToken("<tool>", special=False, normalized=True), normalizer=normalizers.Lowercase()
    ),
    "overlapping tokens": lambda: bpe(AddedToken("<tool>", special=False), AddedToken("ol><too", special=False)),
    "added white space": lambda: bpe(AddedToken("  ", special=False), AddedToken("\n\n", special=False)),
}
TYPED = [
    "<|mask|>",
    "x<|end|>y",
    "<tool>",
    " <tool> ",
    "<TOOL>",
    "<tool><tool>",
    "<|mask|><|mask|>",
    "<tool",
    "<|mask|",
]


@each("kind", TOKENIZERS)
def test_ordinary_text_is_tokenized_as_ever(kind: str, toy_spec: Callable[..., ModelSpec]) -> None:
    tokenizer = TOKENIZERS[kind]()
    plain = PlainText(tokenizer, spec_of(tokenizer, toy_spec))
    for text in TEXTS:
        assert plain(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@each("kind", TOKENIZERS)
def test_what_is_typed_stays_characters(kind: str, toy_spec: Callable[..., ModelSpec]) -> None:
    tokenizer = TOKENIZERS[kind]()
    plain = PlainText(tokenizer, spec_of(tokenizer, toy_spec))
    added = {i for word, i in tokenizer.get_added_vocab().items() if word.strip()}
    for text in [*TYPED, "find ".join(TYPED)]:
        ids = plain(text)
        assert added.isdisjoint(ids)
        assert tokenizer.decode(ids).lower() == text.lower()  # nothing is lost


@each("typed", ["<tóol>", "<to\u0301ol>", "＜ｔｏｏｌ＞", "＜tool＞", "<TO\u200bOL>", "a <ｔｏｏｌ>\n<TOOL> b"])
def test_what_a_normalizer_makes_a_special_token_stays_characters(
    typed: str, toy_spec: Callable[..., ModelSpec]
) -> None:
    alike = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Replace("\u200b", ""), normalizers.Lowercase()]
    tool = AddedToken("<tool>", special=False, normalized=True)
    tokenizer = bpe(tool, normalizer=normalizers.Sequence(alike))
    plain, own = PlainText(tokenizer, spec_of(tokenizer, toy_spec)), tokenizer.convert_tokens_to_ids("<tool>")
    assert own in tokenizer(typed, split_special_tokens=True)["input_ids"] and own not in plain(typed)
    assert tokenizer.decode(plain(typed)) == tokenizer.backend_tokenizer.normalizer.normalize_str(typed)


@each(
    ("text", "error", "message"),
    [
        (["go"], TypeError, r"the text is a list \(\['go'\]\); it must be a str"),
        (b"go", TypeError, "the text is a bytes"),
        (None, TypeError, "the text is a NoneType"),
        ("half \ud83d", ValueError, r"can't encode character '\\ud83d' in position 5"),
    ],
)
def test_what_is_no_text_is_named(
    text: Any, error: type[Exception], message: str, toy_spec: Callable[..., ModelSpec]
) -> None:
    tokenizer = bpe()
    with pytest.raises(error, match=message):
        PlainText(tokenizer, spec_of(tokenizer, toy_spec))(text)


def test_a_slow_tokenizer(toy_spec: Callable[..., ModelSpec]) -> None:
    tokenizer = ByT5Tokenizer()
    rows = len(tokenizer)
    none = {"image_begin": (), "image_end": (), "codebook_size": 0, "image_offset": rows, "image_grid": (0, 0)}
    eos = tokenizer.convert_tokens_to_ids("</s>")
    text = {"text_end": (eos,), "image_next": None, "text_range": (0, rows), "bos": None}
    mask = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    plain = PlainText(tokenizer, toy_spec(mask=mask, pad=0, logit_rows=rows, **text, **none))
    for said in ("go", "a</s>b<pad><extra_id_0>"):
        assert tokenizer.decode(plain(said)) == said and plain.special.isdisjoint(plain(said))
    assert tokenizer("a</s>b<pad><extra_id_0>", add_special_tokens=False)["input_ids"] != plain(
        "a</s>b<pad><extra_id_0>"
    )


def test_what_cannot_be_written_otherwise_is_refused(toy_spec: Callable[..., ModelSpec]) -> None:
    tokenizer = bpe()
    spec = spec_of(tokenizer, toy_spec)
    letter = tokenizer.convert_tokens_to_ids("g")
    plain = PlainText(tokenizer, toy_spec(**{**spec.to_dict(), "mask": letter}))
    with pytest.raises(ValueError, match=r"the text 'g x' reads as the special token 'g', which only templates write"):
        plain("g x")


def test_marks_do_not_part_words() -> None:
    """What stands between two marks of a template is tokenized as one: the ids are those of the whole string."""
    names = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = bpe(*(AddedToken(name, special=True) for name in names))
    id = tokenizer.convert_tokens_to_ids
    markup = ChatMarkup(*map(id, names), id("<|end|>"))
    own = ChatTemplates(
        Ids(mask=id("<|mask|>"), bos=markup.bos, eos=markup.turn_end),
        lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        markup,
    )
    for said in ("\nfind the goal\n", "the goal "):
        whole = f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{said}<|end|>"
        whole += "<|start_header_id|>assistant<|end_header_id|>\n\n"
        (segment,) = own.prompt([said])
        assert segment.modality is Modality.TEXT
        assert segment.tokens.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
