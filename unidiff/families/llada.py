"""LLaDA (8B Base, Instruct, 1.5): text only. MMaDA, MMaDA-Parallel and Lumina-DiMOO have the same architecture; they
subclass `Llada` and change its class fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unidiff import images
from unidiff.config import checked, convert
from unidiff.families import checkpoint
from unidiff.families.architecture import KEYS, check_weights, read_architecture, unread_fields
from unidiff.families.backbone import Backbone
from unidiff.families.registry import FAMILIES, register
from unidiff.families.templates import chat_markup, text_ids
from unidiff.images.preprocess import Preprocess
from unidiff.images.tokenizer import ImageTokenizer
from unidiff.images.weights import check_finite
from unidiff.model import UnifiedModel
from unidiff.plain_text import PlainText
from unidiff.spec import ModelSpec, PadPolicy
from unidiff.templates.chat import ChatTemplates
from unidiff.templates.layout import Ids, Tokenize

# ---------------------------------------------------------------- the family


class Token(NamedTuple):
    """A token of a family. id: as published, None = known only from the tokenizer.

    need: "named" = the tokenizer must have it with this text; "used" = it must have an id, but published tokenizers may
    give it another text (a reserved token); "optional" = left out if the tokenizer lacks it.
    """

    text: str
    id: int | None
    need: Literal["named", "used", "optional"] = "used"


# Tokens of LLaDA's tokenizer, which every family has.
LLADA_TOKENS = {
    "mask": Token("<|mdm_mask|>", 126336, "named"),
    "bos": Token("<|startoftext|>", 126080, "named"),
    "eos": Token("<|endoftext|>", 126081, "named"),
    "start_header": Token("<|start_header_id|>", 126346, "optional"),
    "end_header": Token("<|end_header_id|>", 126347, "optional"),
    "eot": Token("<|eot_id|>", 126348, "optional"),
}
_STATED = {"mask": "mask_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


@register
class Llada:
    """Loading and saving of LLaDA checkpoints; related families override the class fields."""

    name: ClassVar[str] = "llada"
    rows: ClassVar[int] = 126464  # of the published head; published ids are valid only with this vocabulary
    tokens: ClassVar[dict[str, Token]] = LLADA_TOKENS
    image_offset: ClassVar[int | None] = None
    codebook_size: ClassVar[int] = 0
    vq: ClassVar[tuple[str, str] | None] = None  # (kind of image tokenizer, its folder in the checkpoint)
    additive_to: ClassVar[str] = "valid_pairs"
    preprocessing: ClassVar[dict[str, Preprocess]] = {}  # of pictures, by task; "default" for all others

    def detect(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "llada" and not is_dimoo(config)

    def layout(self, ids: dict[str, int], offset: int | None, rows: int, positions: int) -> dict[str, Any]:
        """The family's own fields of `ModelSpec`."""
        return {
            "text_end": tuple(ids[name] for name in ("eos", "eot") if name in ids),
            "image_next": None,
            "image_begin": (),
            "image_end": (),
            "text_range": (0, rows),
            "image_grid": (0, 0),
            "text_length": 128,
            "max_positions": positions,
            "sampler": {"text_steps": 128, "text_block": 32, "text_threshold": None, "text_temperature": 0.0},
        }

    def other_offset(self, config: dict[str, Any], rows: int, size: int) -> int:
        """The offset of image codes in an unpublished vocabulary, if config.json does not state it."""
        warnings.warn(
            f"image_offset is taken from the tokenizer ({size}), since {rows} rows were never published; state it in "
            "config.json as unidiff.spec.image_offset to have it checked",
            stacklevel=3,
        )
        return size

    def check_size(self, spec: ModelSpec, size: int) -> None:
        """Raises ValueError unless a tokenizer whose highest id is `size` - 1 fits the spec."""
        if size > spec.logit_rows:
            raise ValueError(f"the tokenizer has ids up to {size - 1}, the head {spec.logit_rows} rows")

    # ------------------------------------------------------------ the body

    def load_backbone(
        self,
        folder: Path,
        config: dict[str, Any],
        dtype: torch.dtype | None = None,
        pad_policy: str | None = None,
        device_map: Any = None,
    ) -> Backbone:
        """Loads only the body. dtype: None = as stored. See `unidiff.families.load_backbone`."""
        policy = convert(pad_policy or "hard", PadPolicy, "pad_policy", words=False)
        llama = read_architecture(config)
        weights = check_weights(folder, llama)
        if unread := unread_fields(config):
            warnings.warn(f"{folder / 'config.json'}: not known, and not read: {', '.join(unread)}", stacklevel=2)
        body = Backbone.from_pretrained(
            folder,
            config=llama,
            key_mapping=KEYS,
            dtype=dtype or weights["model.transformer.wte.weight"].dtype,
            device_map=device_map,
            use_safetensors=True,
        )
        check_finite(body, folder)
        body.published = self._published(config)
        body.ids, body.pad_policy, body.additive_to = self._stated(config), policy, self.additive_to
        return body

    def _published(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json, plus the family's name if it cannot be detected from it."""
        bare = {k: v for k, v in config.items() if k != "unidiff"}
        own = dict(config.get("unidiff", {}))
        if any(f.name != self.name for f in FAMILIES.values() if f.detect(bare)):
            own["family"] = self.name
        return {**bare, "unidiff": own} if own else bare

    def _stated(self, config: dict[str, Any]) -> dict[str, int]:
        """Ids by name: from config.json, else published ids that have a row. Raises ValueError if config.json states
        an invalid id."""
        ids = {name: t.id for name, t in self.tokens.items() if name in _STATED and t.id is not None}
        for name, field in _STATED.items():
            if (value := config.get(field)) is not None:
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < config["vocab_size"]:
                    raise ValueError(
                        f"config.json: {field} is {value!r}, no id below vocab_size {config['vocab_size']}"
                    )
                ids[name] = value
        return {name: id for name, id in {"pad": ids["eos"], **ids}.items() if id < config["vocab_size"]}

    # ------------------------------------------------------------ the spec

    def build_spec(self, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> ModelSpec:
        """The spec of a checkpoint, checked against its tokenizer.

        Ids come from config.json (`mask_token_id`, …, and fields of `ModelSpec` under unidiff.spec); else, for the
        published vocabulary, from the published table; else from the tokenizer. Raises ValueError with the field.
        """
        own = config.get("unidiff", {}).get("spec", {})
        own = {**own, **checked(own, ModelSpec, "ModelSpec.")}
        word = tokenizer.get_vocab()
        numbers = set(word.values())
        size = max(numbers) + 1
        published = rows == self.rows
        ids: dict[str, int] = {}
        for name, token in self.tokens.items():
            found = word.get(token.text)
            if token.need == "named" and found is None:
                raise ValueError(f"the tokenizer has no {token.text!r}: it is not one of family {self.name}")
            best = token.id if published and token.id is not None else found
            if token.need == "optional" and best not in numbers:
                best = None
            if best is None and name not in own.get("special", {}) and token.need == "used":
                raise ValueError(
                    f"the tokenizer has no {token.text!r}, and with {rows} rows instead of the published {self.rows} "
                    f"its id is not known; state it in config.json: unidiff.spec.special.{name}"
                )
            if best is not None:
                ids[name] = best
        stated = {name: config[f] for name, f in _STATED.items() if config.get(f) is not None}
        ids |= {**stated, **own.get("special", {})}
        offset = own.get("image_offset", self.image_offset)
        if self.image_offset is not None and not published and "image_offset" not in own:
            offset = self.other_offset(config, rows, size)
        fields = self._fields(ids, offset, rows, config)
        spec = ModelSpec.from_dict({**fields, **own, "special": fields["special"]})
        self._check(spec, word, size)
        return spec

    def _fields(self, ids: dict[str, int], offset: int | None, rows: int, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "family": self.name,
            "mask": ids["mask"],
            "pad": ids.get("pad", ids["eos"]),
            "bos": ids["bos"],
            "image_offset": rows if offset is None else offset,
            "codebook_size": config.get("codebook_size", self.codebook_size) if self.codebook_size else 0,
            "logit_rows": rows,
            "text_begin": (),  # the templates write the whole prompt
            "attention": "bidirectional",
            "additive_to": self.additive_to,
            "special": {name: id for name, id in ids.items() if name not in ("mask", "bos", "pad")},
            **self.layout(ids, offset, rows, config["max_sequence_length"]),
        }

    def _check(self, spec: ModelSpec, word: dict[str, int], size: int) -> None:
        known = {"mask": spec.mask, "bos": spec.bos, **spec.special}
        for name, token in self.tokens.items():
            if token.text in word and name in known and known[name] != word[token.text]:
                raise ValueError(
                    f"ModelSpec.{name if name in ('mask', 'bos') else f'special[{name!r}]'} is {known[name]}, but the "
                    f"tokenizer has {token.text!r} at {word[token.text]}; it does not belong to this checkpoint"
                )
        self.check_size(spec, size)

    # ------------------------------------------------------------ the model

    def load(
        self,
        folder: Path,
        config: dict[str, Any],
        dtype: torch.dtype,
        pad_policy: str | None = None,
        device_map: Any = None,
        image_tokenizer: str | Path | None = None,
        **fields: Any,
    ) -> UnifiedModel:
        """Loads the body, the tokenizers and the spec. image_tokenizer: the image tokenizer's folder, if it is not in
        the checkpoint's. fields: of `ModelSpec` (text_length, image_grid, …); treated like unidiff.spec of config.json.
        Raises FileNotFoundError or ValueError."""
        rows = read_architecture(config).vocab_size
        check_weights(folder, read_architecture(config))  # first, for the clearer error
        tokenizer = checkpoint.read_tokenizer(folder)
        own = config.get("unidiff", {})
        stated = {**own.get("spec", {}), **fields, **({} if pad_policy is None else {"pad_policy": pad_policy})}
        spec = self.build_spec({**config, "unidiff": {**own, "spec": stated}}, tokenizer, rows)
        pictures = self._images(folder, config, spec, image_tokenizer)
        body = self.load_backbone(folder, config, dtype, spec.pad_policy, device_map)
        template = self.templates(spec, PlainText(tokenizer, spec))
        return UnifiedModel(body, spec, tokenizer, pictures, template=template, preprocess=self.preprocessing)

    def templates(self, spec: ModelSpec, tokenize: Tokenize) -> Any:
        """The family's templates. tokenize: words to ids, without special tokens. Raises ValueError if a special token
        is missing. A base model's tokenizer has no chat headers."""
        markup = chat_markup(spec) if "start_header" in spec.special else None
        return ChatTemplates(Ids(**text_ids(spec)), tokenize, markup)

    def _images(
        self, folder: Path, config: dict[str, Any], spec: ModelSpec, given: str | Path | None
    ) -> ImageTokenizer | None:
        if self.vq is None:
            return None
        kind, subfolder = config.get("unidiff", {}).get("image_tokenizer", self.vq[0]), self.vq[1]
        place = Path(given) if given is not None else folder / subfolder
        if not place.is_dir():
            raise FileNotFoundError(
                f"{place} does not exist: family {self.name} needs its image tokenizer ({kind}) there, or in the "
                "folder that image_tokenizer=… names"
            )
        return images.load(kind, place, spec.codebook_size)

    def save(self, model: UnifiedModel, folder: Path) -> None:
        """Writes a folder that `load` reads. Settings that the published config.json lacks go to its key "unidiff"."""
        body = model.backbone
        assert isinstance(body, Backbone)
        bare = {k: v for k, v in body.published.items() if k != "unidiff"}
        own = {k: v for k, v in body.published.get("unidiff", {}).items() if k != "spec"}
        if spec := self._to_state(model.spec, bare):
            own["spec"] = spec
        body.published = {**bare, "unidiff": own} if own else bare
        body.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        if self.vq is not None:
            model.images.save_pretrained(folder / self.vq[1])

    def _to_state(self, spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of a spec that differ from the published ones: a tiny vocabulary's ids, or a user's choice."""
        ids = {name: spec.special.get(name, t.id) for name, t in self.tokens.items() if t.id is None}
        ids |= {name: t.id for name, t in self.tokens.items() if t.id is not None and name in ("mask", "bos")}
        ids |= {name: t.id for name, t in self.tokens.items() if t.id is not None and name in spec.special}
        ids |= {name: config[f] for name, f in _STATED.items() if config.get(f) is not None}
        usual = self._fields({k: v for k, v in ids.items() if v is not None}, self.image_offset, self.rows, config)
        default = {"row_separator": None, "pad_policy": "hard", "sampler": {}, **usual}
        return {k: v for k, v in spec.to_dict().items() if v != default.get(k) and k != "logit_rows"}

    # ------------------------------------------------------------ inspection

    def checks(self, folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
        """The checks of `tools/inspect_checkpoint.py`: a name, and a function that returns a finding or raises."""

        def architecture() -> str:
            c = read_architecture(config)
            unread = unread_fields(config)
            return (
                f"{c.num_hidden_layers} layers, d_model {c.hidden_size}, {c.num_attention_heads} heads "
                f"({c.num_key_value_heads} of keys), mlp {c.intermediate_size}, {c.vocab_size} rows, "
                f"{c.max_position_embeddings} positions" + (f"; not read: {', '.join(unread)}" if unread else "")
            )

        def weights() -> str:
            found = check_weights(folder, read_architecture(config))
            files, kinds = {w.file for w in found.values()}, {str(w.dtype) for w in found.values()}
            return f"{len(found)} tensors in {len(files)} files, {', '.join(sorted(kinds))}; names and shapes fit"

        def ids() -> str:
            spec = self.build_spec(config, checkpoint.read_tokenizer(folder), read_architecture(config).vocab_size)
            offset = f", image codes at {list(spec.image_range)}" if spec.codebook_size else ""
            return f"special tokens are where they belong, mask {spec.mask}{offset}"

        def pictures() -> str:
            spec = self.build_spec(config, checkpoint.read_tokenizer(folder), read_architecture(config).vocab_size)
            tokenizer = self._images(folder, config, spec, None)
            return f"{type(tokenizer).__name__}, {spec.codebook_size} codes" if tokenizer else "none, text alone"

        yield "config.json", architecture
        yield "weights", weights
        yield "tokenizer and ids", ids
        yield "image tokenizer", pictures

    def spec_of(self, folder: Path, config: dict[str, Any]) -> ModelSpec:
        return self.build_spec(config, checkpoint.read_tokenizer(folder), read_architecture(config).vocab_size)


def is_dimoo(config: dict[str, Any]) -> bool:
    """Whether it is Lumina-DiMOO or MMaDA-Parallel-A: their model_type is also llada, but their class or vocabulary
    differs."""
    named = "LLaDAForMultiModalGeneration" in str(config.get("architectures"))
    return named or config.get("vocab_size") == 134548
