"""ModelConfig from a checkpoint's config.json and generation_config.json.

Nothing else in the package reads fields of these files. A field is either understood, or known to
have no effect on inference, or refused by name: a checkpoint that asks for something we do not
compute must never be decoded as if it had not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from orthrus_fast.errors import ConfigError, RequestError, list_some, shown
from orthrus_fast.files import read_object
from orthrus_fast.options import DTYPES, dtype_name

_log = logging.getLogger("orthrus_fast")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of transformers' configs that do not change what inference computes.
_WITHOUT_EFFECT = _names(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures "
    "attention_dropout bos_token_id chunk_size_feed_forward decoder_start_token_id "
    "finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id "
    "max_window_layers output_attentions output_hidden_states pad_token_id prefix problem_type "
    "return_dict return_dict_in_generate sep_token_id task_specific_params tf_legacy_loss "
    "tokenizer_class torchscript transformers_version use_bfloat16 use_cache "
    # Of generation: what ends, returns and scores a text, and beam search, where num_beams is 1.
    "early_stopping length_penalty max_length max_new_tokens num_return_sequences output_logits "
    "output_scores remove_invalid_values renormalize_logits"
)
# Left behind by training. Adapters that were not merged would show as tensors.
_OF_TRAINING = _names(
    "base_model base_params gradient_checkpointing lora_alpha lora_bias lora_dropout lora_r "
    "lora_rank lora_target_modules num_anchors r total_params trainable_params unsloth_fixed "
    "unsloth_version"
)
# Fields that would change the computation, and the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
}
# Fields of generation that change which tokens are sampled, and the values under which they do not.
_NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        _names(
            "encoder_repetition_penalty guidance_scale num_beam_groups num_beams "
            "repetition_penalty typical_p"
        ),
        (1,),
    ),
    **dict.fromkeys(
        _names(
            "diversity_penalty encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff min_length "
            "min_new_tokens no_repeat_ngram_size penalty_alpha"
        ),
        (0,),
    ),
    **dict.fromkeys(
        _names(
            "bad_words_ids begin_suppress_tokens constraints dola_layers "
            "exponential_decay_length_penalty force_words_ids forced_bos_token_id "
            "forced_eos_token_id sequence_bias stop_strings suppress_tokens token_healing top_h "
            "watermarking_config"
        ),
        (False, [], {}),
    ),
}
_SAMPLING = ("min_p", "temperature", "top_k", "top_p")
_READ = _names(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings "
    "rope_parameters rope_theta rope_scaling dtype torch_dtype block_size mask_token_id "
    "eos_token_id model_type layer_types sliding_window auto_map quantization "
    "quantization_config do_sample"
).union(_SAMPLING, _NEUTRAL_SAMPLING)
_YARN_RANGE = (1e-4, 1e4)  # beyond it, tables overflow; honest values lie between 0.1 and 100


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of type "default" or "yarn" (arXiv 2309.00071); only yarn reads the rest."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint says about itself. Token counts in tokens, sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # yarn stretches what config.json says to factor times original
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: str = "float32"
    block_size: int | None = None  # None, as mask_token_id: a plain Qwen3, without the draft view
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    # Of generation_config.json, sorted; "unserved" are settings that are not implemented.
    sampling_defaults: tuple[tuple[str, Any], ...] = ()
    # Of a model shared among ranks, of whose heads and MLP the numbers above are this one's share.
    rank: int = 0
    n_ranks: int = 1

    @property
    def has_draft_view(self) -> bool:
        return self.block_size is not None

    @property
    def cache_elements_per_token(self) -> int:
        """K and V elements that one committed token takes in one slot, over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    def share(self, rank: int, n_ranks: int) -> ModelConfig:
        """What one of ``n_ranks`` has of a whole model. Raises RequestError if they don't divide.

        Heads, the MLP's features and the output head's rows are divided.
        """
        for name in ("n_kv_heads", "intermediate_size", "vocab_size"):
            whole = getattr(self, name)
            if whole % n_ranks:
                raise RequestError(
                    f"tensor_parallel: {n_ranks} does not divide {name} {whole}: "
                    f"{whole} = {n_ranks} x {whole // n_ranks} + {whole % n_ranks}"
                )
        return self._scaled(1, n_ranks, rank)

    @property
    def whole(self) -> ModelConfig:
        """The config of which this is a share."""
        return self._scaled(self.n_ranks, 1, 0)

    def _scaled(self, times: int, n_ranks: int, rank: int) -> ModelConfig:
        divided = {
            name: getattr(self, name) * times // n_ranks
            for name in ("n_heads", "n_kv_heads", "intermediate_size")
        }
        return replace(self, **divided, rank=rank, n_ranks=n_ranks)


def read_config(directory: Path, ignore_fields: Collection[str] = ()) -> ModelConfig:
    """ModelConfig of a checkpoint directory. Raises ConfigError that names the field."""
    path = directory / "config.json"
    fields = read_object(path)
    generation_path = directory / "generation_config.json"
    generation = read_object(generation_path) if generation_path.exists() else None
    return parse_config(fields, generation, str(path), ignore_fields)


def parse_config(
    fields: dict[str, Any],
    generation: dict[str, Any] | None = None,
    source: str = "config.json",
    ignore_fields: Collection[str] = (),
) -> ModelConfig:
    """ModelConfig from parsed JSON objects. Raises ConfigError naming ``source`` and the field.

    Fields that are not known here are refused, but for ``ignore_fields``. Without ``generation``,
    generation's fields are those of config.json, where older checkpoints have them.
    """
    reader = _Reader(fields, source, ignore_fields)
    _check_model_type(reader)
    orthrus = _is_orthrus(fields)
    _check_unread_fields(reader, orthrus)
    vocab_size = reader.integer("vocab_size", 2, 2**24)
    n_heads = reader.integer("num_attention_heads", 1, 2**12)
    n_kv_heads = reader.integer("num_key_value_heads", 1, 2**12, default=n_heads)
    hidden_size = reader.integer("hidden_size", 1, 2**17)
    head_dim = reader.integer("head_dim", 2, 2**10, default=hidden_size // n_heads)
    if n_heads % n_kv_heads:
        reader.fail("num_key_value_heads", f"{n_kv_heads} does not divide {n_heads} heads")
    if head_dim % 2:
        reader.fail("head_dim", f"{head_dim} is odd, and RoPE rotates pairs")
    max_position_embeddings = reader.integer("max_position_embeddings", 1, 2**31 - 1)
    generation_source = str(Path(source).with_name("generation_config.json"))
    generation_reader = reader if generation is None else _Reader(generation, generation_source)
    rope = _parse_rope(reader, max_position_embeddings)
    stretched = min(int(rope.factor * rope.original_max_position_embeddings), 2**31 - 1)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size", 1, 2**20),
        n_layers=reader.integer("num_hidden_layers", 1, 2**10),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0),
        max_position_embeddings=max(max_position_embeddings, stretched),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        rope=rope,
        dtype=_parse_dtype(reader),
        block_size=reader.integer("block_size", 2, 2**10) if orthrus else None,
        mask_token_id=reader.integer("mask_token_id", 0, vocab_size - 1) if orthrus else None,
        eos_token_ids=_parse_eos(reader, generation_reader, vocab_size),
        sampling_defaults=_parse_sampling(generation_reader),
    )


class _Reader:
    """Typed access to the fields of one JSON object; its errors name the file and the field."""

    def __init__(
        self, fields: dict[str, Any], source: str, ignore_fields: Collection[str] = ()
    ) -> None:
        self.fields = fields
        self.source = source
        self.ignore_fields = ignore_fields

    def unknown(self, known: Collection[str], where: str) -> list[str]:
        """What there is to say of each field that is neither known nor to be ignored."""
        return [
            f"{shown(name)}: not known {where}, and may change the computation"
            for name, value in self.fields.items()
            if value is not None and name not in known and name not in self.ignore_fields
        ]

    def refuse(self, wrong: list[str]) -> NoReturn:
        raise ConfigError(
            f"{self.source}: {list_some(wrong)}; refused (ignore_config_fields, or "
            "--ignore-config-field, lets a field through that is not known)"
        )

    def fail(self, name: str, why: str) -> NoReturn:
        text = f"{name}: {why}"
        if not text.isprintable():
            text = ascii(text)  # a name or value out of the file, kept to one harmless line
        raise ConfigError(f"{self.source}: {text if len(text) <= 300 else text[:300] + '…'}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None and default is None:
            self.fail(name, "absent")
        return default if value is None else value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"{value!r} is not an integer")
        if not low <= value <= high:
            self.fail(name, f"{value} is not within {low} … {high}")
        return value

    def number(
        self, name: str, low: float, high: float = 1e30, default: float | None = None
    ) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, f"{value!r} is not a number")
        if not low < value < high:
            self.fail(name, f"{value} is not between {low} and {high}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self.fields.get(name) is None else self.number(name, low, high)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"{value!r} is not true or false")
        return value


def _check_model_type(reader: _Reader) -> None:
    model_type = reader.fields.get("model_type")
    if model_type not in ("qwen3", "orthrus"):
        reader.fail(
            "model_type", f"{model_type!r} is not supported, only 'qwen3' and 'orthrus' are"
        )
    architectures = reader.fields.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        reader.fail("architectures", "not a list of names")
    for name in architectures:
        if name not in ("OrthrusLM", "Qwen3ForCausalLM"):
            reader.fail("architectures", f"{name!r} is not OrthrusLM or Qwen3ForCausalLM")


def _is_orthrus(fields: dict[str, Any]) -> bool:
    return (
        fields.get("model_type") == "orthrus"
        or "OrthrusLM" in (fields.get("architectures") or [])
        or fields.get("block_size") is not None
        or fields.get("mask_token_id") is not None
    )


def _check_unread_fields(reader: _Reader, orthrus: bool) -> None:
    fields = reader.fields
    for name in ("quantization_config", "quantization"):  # mlx has both, and names no method
        if value := fields.get(name):
            method = value.get("quant_method") if isinstance(value, dict) else None
            method = method or ("MLX" if fields.get("quantization") else "of an unknown method")
            reader.fail(
                name, f"quantized checkpoints are not supported ({method}); use the bf16 one"
            )
    wrong = [
        f"{name}: {shown(repr(fields[name]))} changes the computation and is not implemented"
        for name in _NEUTRAL.keys() & fields.keys()
        if fields[name] not in _NEUTRAL[name]
    ]
    if fields.get("auto_map") and not orthrus and "auto_map" not in reader.ignore_fields:
        code = shown(repr(fields["auto_map"]))
        wrong.append(f"auto_map: {code} is code of the checkpoint's own, which is never run")
    wrong += reader.unknown(_READ | _WITHOUT_EFFECT | _OF_TRAINING | _NEUTRAL.keys(), "here")
    if wrong:
        reader.refuse(sorted(wrong))
    if leftovers := sorted(_OF_TRAINING & fields.keys()):
        _log.info("%s: %s: of training alone, ignored", reader.source, ", ".join(leftovers))
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list):
        reader.fail("layer_types", "not a list of names")
    if any(kind != "full_attention" for kind in layer_types):
        reader.fail("layer_types", "only 'full_attention' is implemented")
    # transformers ignores sliding_window unless use_sliding_window is set, which _NEUTRAL refuses.


def _parse_dtype(reader: _Reader) -> str:
    given = reader.fields.get("dtype") or reader.fields.get("torch_dtype") or "float32"
    name = dtype_name(given)
    if name is None:
        reader.fail("dtype", f"{given!r} is not one of {', '.join(DTYPES)}")
    return name


def _parse_rope(reader: _Reader, max_position_embeddings: int) -> RopeConfig:
    """Read ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""
    new, old = reader.fields.get("rope_parameters"), reader.fields.get("rope_scaling")
    if new is not None and old is not None and new != old:
        reader.fail("rope_scaling", "contradicts rope_parameters; keep one of the two")
    name = "rope_parameters" if new is not None else "rope_scaling"
    values = new if new is not None else (old if old is not None else {})
    if not isinstance(values, dict):
        reader.fail(name, "not an object")
    rope = _Reader(dict(values), f"{reader.source}: {name}", reader.ignore_fields)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if values.get("type", rope_type) != rope_type:
        rope.fail("type", f"{values['type']!r} contradicts rope_type {rope_type!r}")
    theta_reader = rope if values.get("rope_theta") is not None else reader
    theta = theta_reader.number("rope_theta", 1.0)
    if reader.fields.get("rope_theta") not in (None, theta):
        reader.fail("rope_theta", f"contradicts {name}, which has {theta}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attn_factor"}
    if rope_type == "yarn":
        known |= {"factor", "original_max_position_embeddings", "attention_factor", "truncate"}
        known |= {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    elif rope_type != "default":
        rope.fail("rope_type", f"{rope_type!r} is not implemented, only 'default' and 'yarn' are")
    if wrong := rope.unknown(known, f"for rope_type {rope_type!r}"):
        rope.refuse(wrong)
    if values.get("attn_factor") is not None:
        _log.warning("%s: attn_factor: ignored, as transformers does", rope.source)
    if values.get("partial_rotary_factor") not in (None, 1.0):
        rope.fail("partial_rotary_factor", "partial rotation is not implemented")
    if rope_type == "default":
        return RopeConfig(theta)
    original = rope.integer(
        "original_max_position_embeddings", 1, 2**31 - 1, default=max_position_embeddings
    )
    return RopeConfig(
        theta=theta,
        type="yarn",
        factor=rope.number("factor", *_YARN_RANGE),
        original_max_position_embeddings=original,
        attention_factor=rope.optional_number("attention_factor", *_YARN_RANGE),
        beta_fast=rope.optional_number("beta_fast", *_YARN_RANGE) or 32.0,
        beta_slow=rope.optional_number("beta_slow", *_YARN_RANGE) or 1.0,
        mscale=rope.optional_number("mscale", *_YARN_RANGE),
        mscale_all_dim=rope.optional_number("mscale_all_dim", *_YARN_RANGE),
        truncate=rope.boolean("truncate", default=True),
    )


def _parse_eos(reader: _Reader, generation: _Reader, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, else config.json's; a number or a list."""
    if generation.fields.get("eos_token_id") is not None:
        reader = generation
    value = reader.fields.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            reader.fail("eos_token_id", f"{token!r} is not an id below vocab_size {vocab_size}")
    return tuple(sorted(set(ids)))


def _parse_sampling(generation: _Reader) -> tuple[tuple[str, Any], ...]:
    fields = generation.fields
    present = [name for name in _SAMPLING if fields.get(name) is not None]
    defaults: list[tuple[str, Any]]
    defaults = [(name, generation.number(name, -1e9, 1e9)) for name in present]
    do_sample = fields.get("do_sample")
    if isinstance(do_sample, bool):
        defaults.append(("do_sample", do_sample))
    unserved = [
        f"{name} {shown(repr(fields[name]))}"
        for name, neutral in _NEUTRAL_SAMPLING.items()
        if fields.get(name) is not None and fields[name] not in neutral
    ]
    if unserved:
        defaults.append(("unserved", list_some(unserved)))
    return tuple(sorted(defaults))
