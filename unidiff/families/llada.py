"""LLaDA (8B Base, Instruct, 1.5): text alone. Its architecture is that of MMaDA, MMaDA-Parallel and Lumina-DiMOO too.

Their published code is one architecture, equal to transformers' Llama without a causal mask under the names of `KEYS`
(same weights: the same logits). Everything below that is not in `Llada`'s class fields holds for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unidiff import images
from unidiff.config import checked, convert
from unidiff.families import FAMILIES, checkpoint, register
from unidiff.families.backbone import Backbone
from unidiff.families.templates import PREPROCESSING, TEMPLATED, templates, variant
from unidiff.images import ImageTokenizer
from unidiff.images.weights import check_finite
from unidiff.model import UnifiedModel
from unidiff.plain_text import PlainText
from unidiff.spec import ModelSpec, PadPolicy

# ---------------------------------------------------------------- names of the weights

_BLOCK, _LAYER = r"^model\.transformer\.blocks\.(\d+)\.", r"model.layers.\1."
_INSIDE = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
_INSIDE |= {"attn_out": "self_attn.o_proj", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
_INSIDE |= {"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
# Published name (a pattern) -> transformers' name, read both ways. `ff_out` is a block's down projection, and outside
# of the blocks the head.
KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{rf"{_BLOCK}{theirs}\.": f"{_LAYER}{ours}." for theirs, ours in _INSIDE.items()},
}


def published_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every weight."""
    d, mlp, rows = llama.hidden_size, llama.intermediate_size, llama.vocab_size
    kv = d // llama.num_attention_heads * (llama.num_key_value_heads or llama.num_attention_heads)
    block = {"attn_norm": (d,), "ff_norm": (d,), "q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d)}
    block |= {"attn_out": (d, d), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, d), "ln_f": (d,)}
    if not llama.tie_word_embeddings:
        shapes["ff_out"] = (rows, d)
    for i in range(llama.num_hidden_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}


# ---------------------------------------------------------------- config.json

# The values with which the architecture is the one that is run here; with any other it computes something else.
_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}
_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")
# Known, and without influence on a forward pass: how it was initialised and run, and numbers of switched-off parts.
_PASSIVE = {"embedding_size", "alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "mlp_ratio"}
_PASSIVE |= {"multi_query_attention", "init_device", "init_fn", "init_std", "init_cutoff_factor", "precision"}
_PASSIVE |= {"use_cache", "train_max_sequence_length", "model_type", "auto_map", "torch_dtype", "unidiff"}
_PASSIVE |= {"mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "_attn_implementation"}
_PASSIVE |= {"llm_vocab_size", "codebook_size", "num_vq_tokens", "num_new_special_tokens", "new_vocab_size"}
_PASSIVE |= {"text_vocab_size", "llm_model_path", "transformers_version", "w_clip_vit", "gradient_checkpointing"}


def _field(config: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in config:
        raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
    value = config[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    positive = not isinstance(value, (int, float)) or isinstance(value, bool) or 0 < value < 1 << 62
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or not positive:
        raise ValueError(f"config.json: {name} is {value!r}, which is no value for it")
    return value


def read_architecture(config: dict[str, Any]) -> LlamaConfig:
    """The Llama that a published config.json describes. Every field is read.

    Raises ValueError naming the field that is missing, of a wrong type, or of a value that means another architecture.
    Dropout is switched off, with a warning if the config asks for it: a ratio of policies needs one function.
    """
    for name, allowed in _FIXED.items():
        if name not in config:
            raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
        if not any(config[name] is a or (config[name] == a and type(config[name]) is type(a)) for a in allowed):
            raise ValueError(f"config.json: {name} is {config[name]!r}; only {allowed[0]!r} is supported")
    for name in _DROPOUTS:
        if name not in config:
            raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
        if config[name]:
            warnings.warn(f"config.json: {name} is {config[name]!r}; dropout is switched off", stacklevel=2)
    d, heads = _field(config, "d_model", int), _field(config, "n_heads", int)
    kv_heads = _kv_heads(config, heads)
    if d % heads or heads % kv_heads:
        raise ValueError(f"config.json: d_model {d}, n_heads {heads} and n_kv_heads {kv_heads} do not divide")
    mlp = _field(config, "mlp_hidden_size", (int, type(None))) or d * _field(config, "mlp_ratio", int)
    _field(config, "embedding_size", (int, type(None)))  # not trusted: see `check_weights`
    return LlamaConfig(
        vocab_size=_field(config, "vocab_size", int),
        hidden_size=d,
        intermediate_size=mlp,
        num_hidden_layers=_field(config, "n_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=_field(config, "max_sequence_length", int),
        rms_norm_eps=_field(config, "rms_norm_eps", float),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(config, "rope_theta", (int, float)))},
        tie_word_embeddings=_field(config, "weight_tying", bool),
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        # Not the published pad: Llama gives the embedding of its pad no gradient, and it is the end token here.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        is_causal=False,  # type: ignore[call-arg]  (a field of every config, but of no signature)
    )


def _kv_heads(config: dict[str, Any], heads: int) -> int:
    stated = _field(config, "n_kv_heads", (int, type(None)))
    shared = config.get("multi_query_attention")
    if stated is None:
        shared = _field(config, "multi_query_attention", (bool, type(None)))
    implied = stated if shared is None else (1 if shared else heads)
    if stated is not None and implied != stated:
        raise ValueError(f"config.json: n_kv_heads is {stated}, but multi_query_attention {shared!r} means {implied}")
    return implied or heads


def unread_fields(config: dict[str, Any]) -> list[str]:
    """Fields of config.json that mean nothing to us: what they change, if anything, is not done."""
    read = {*_FIXED, *_DROPOUTS, *_PASSIVE, "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size"}
    read |= {"vocab_size", "max_sequence_length", "rms_norm_eps", "rope_theta", "weight_tying"}
    return sorted(set(config) - read - set(LlamaConfig().to_dict()))


def check_weights(folder: Path, llama: LlamaConfig) -> dict[str, checkpoint.Weight]:
    """The headers of a folder's weights, which must be the config's. Raises FileNotFoundError or ValueError."""
    found = checkpoint.read_headers(folder)
    if llama.num_hidden_layers > len(found):  # before so many are built
        raise ValueError(f"config.json: n_layers is {llama.num_hidden_layers}, but the files hold {len(found)} weights")
    wanted = published_shapes(llama)
    table, rows = "model.transformer.wte.weight", llama.vocab_size
    if table in found and found[table].shape[:1] != (rows,):
        raise ValueError(
            f"config.json: vocab_size is {rows}, but {table} has {found[table].shape[0]} rows; "
            "the weights and the config are not of one checkpoint, or the vocabulary was resized without saving it"
        )
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing {missing[:3]}, {len(extra)} are unexpected {extra[:3]}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{found[name].file}: {name} is {found[name].shape}, config.json says {shape}")
    return found


# ---------------------------------------------------------------- the family


class Token(NamedTuple):
    """A token of a family. id: as published, None = not known without the tokenizer.

    need: "named" = the tokenizer must have it under this text; "used" = it must have an id, but published tokenizers
    may call it otherwise (a reserved token); "optional" = left out where the tokenizer lacks it.
    """

    text: str
    id: int | None
    need: Literal["named", "used", "optional"] = "used"


# As in every family: what LLaDA's tokenizer has.
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
    """Loading and saving of LLaDA checkpoints; the families that share its architecture change the class fields."""

    name: ClassVar[str] = "llada"
    rows: ClassVar[int] = 126464  # of the head, as published; the published ids hold for this vocabulary only
    tokens: ClassVar[dict[str, Token]] = LLADA_TOKENS
    image_offset: ClassVar[int | None] = None
    codebook_size: ClassVar[int] = 0
    vq: ClassVar[tuple[str, str] | None] = None  # kind of image tokenizer, its folder in the checkpoint
    additive_to: ClassVar[str] = "valid_pairs"

    def detect(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "llada" and not is_dimoo(config)

    def layout(self, ids: dict[str, int], offset: int | None, rows: int, positions: int) -> dict[str, Any]:
        """The fields of `ModelSpec` that are the family's own."""
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
        """Where image codes begin in a vocabulary that was never published, if config.json does not say it."""
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
        """The body alone; dtype None: as stored. See `unidiff.families.load_backbone`."""
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
        """config.json, with the family's name where it could not be told from it."""
        bare = {k: v for k, v in config.items() if k != "unidiff"}
        own = dict(config.get("unidiff", {}))
        if any(f.name != self.name for f in FAMILIES.values() if f.detect(bare)):
            own["family"] = self.name
        return {**bare, "unidiff": own} if own else bare

    def _stated(self, config: dict[str, Any]) -> dict[str, int]:
        """Ids by name: what config.json states, else what was published and has a row. Raises ValueError if what it
        states is no id."""
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

        Ids are those that config.json states (`mask_token_id`, …, and fields of `ModelSpec` under unidiff.spec), else,
        for the published vocabulary, the published ones; else the tokenizer's. Raises ValueError naming the field.
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
            "text_begin": (),  # the templates write all of a prompt
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
        """The body, the tokenizers and the spec. image_tokenizer: the folder of the image tokenizer, if it is not in
        the checkpoint's. fields: of `ModelSpec`, as config.json may state them under unidiff.spec, and checked as if it
        did: text_length, image_grid, …. Raises FileNotFoundError or ValueError."""
        rows = read_architecture(config).vocab_size
        check_weights(folder, read_architecture(config))  # first: what the tokenizer lacks may be another's vocabulary
        tokenizer = self._tokenizer(folder)
        own = config.get("unidiff", {})
        stated = {**own.get("spec", {}), **fields, **({} if pad_policy is None else {"pad_policy": pad_policy})}
        spec = self.build_spec({**config, "unidiff": {**own, "spec": stated}}, tokenizer, rows)
        pictures = self._images(folder, config, spec, image_tokenizer)
        body = self.load_backbone(folder, config, dtype, spec.pad_policy, device_map)
        model = UnifiedModel(body, spec, tokenizer, pictures, template=self.templates(spec, tokenizer))
        if spec.family in TEMPLATED:
            model.preprocess = PREPROCESSING.get(variant(spec, spec.special), {})
        return model

    def templates(self, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The family's templates; None for one that has none of its own (texts and pictures stand as they are)."""
        return templates(spec, spec.special, PlainText(tokenizer, spec)) if spec.family in TEMPLATED else None

    def _tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} lacks tokenizer.json; load_backbone needs no tokenizer")
        return PreTrainedTokenizerFast.from_pretrained(folder)

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
        """Writes what `load` reads. What config.json cannot tell goes there under the key "unidiff"."""
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
        """The fields of a spec that are not the published ones: a tiny vocabulary's ids, or a user's choice."""
        ids = {name: spec.special.get(name, t.id) for name, t in self.tokens.items() if t.id is None}
        ids |= {name: t.id for name, t in self.tokens.items() if t.id is not None and name in ("mask", "bos")}
        ids |= {name: t.id for name, t in self.tokens.items() if t.id is not None and name in spec.special}
        ids |= {name: config[f] for name, f in _STATED.items() if config.get(f) is not None}
        usual = self._fields({k: v for k, v in ids.items() if v is not None}, self.image_offset, self.rows, config)
        default = {"row_separator": None, "pad_policy": "hard", "pixel_range": (0.0, 1.0), "sampler": {}, **usual}
        return {k: v for k, v in spec.to_dict().items() if v != default.get(k) and k != "logit_rows"}

    # ------------------------------------------------------------ inspection

    def checks(self, folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
        """What `tools/inspect_checkpoint.py` looks at: a name, and a function that says what it found or raises."""

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
            spec = self.build_spec(config, self._tokenizer(folder), read_architecture(config).vocab_size)
            offset = f", image codes at {list(spec.image_range)}" if spec.codebook_size else ""
            return f"special tokens are where they belong, mask {spec.mask}{offset}"

        def pictures() -> str:
            spec = self.build_spec(config, self._tokenizer(folder), read_architecture(config).vocab_size)
            tokenizer = self._images(folder, config, spec, None)
            return f"{type(tokenizer).__name__}, {spec.codebook_size} codes" if tokenizer else "none, text alone"

        yield "config.json", architecture
        yield "weights", weights
        yield "tokenizer and ids", ids
        yield "image tokenizer", pictures

    def spec_of(self, folder: Path, config: dict[str, Any]) -> ModelSpec:
        return self.build_spec(config, self._tokenizer(folder), read_architecture(config).vocab_size)


def is_dimoo(config: dict[str, Any]) -> bool:
    """Lumina-DiMOO and MMaDA-Parallel-A say model_type llada too: told by their class, or their vocabulary."""
    named = "LLaDAForMultiModalGeneration" in str(config.get("architectures"))
    return named or config.get("vocab_size") == 134548
