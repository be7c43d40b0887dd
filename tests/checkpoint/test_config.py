"""config.json and generation_config.json: a field is understood, harmless, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_fast.config import ModelConfig, RopeConfig, parse_config, read_config
from orthrus_fast.errors import CheckpointError, ConfigError, RequestError
from orthrus_fast.files import read_json
from orthrus_fast.model import rope_table
from orthrus_fast.sampling import SamplingParams
from tests.checkpoints import TINY, tiny_config

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"


def refusal(fields: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(fields, generation, "somewhere/config.json")
    message = str(caught.value)
    assert message.startswith("somewhere/") and message.isprintable() and len(message) < 400
    return message


def with_rope(**rope: Any) -> dict[str, Any]:
    return tiny_config(rope_parameters={"rope_theta": 1e4, **rope})


# What a config says


def test_every_field_arrives() -> None:
    fields = tiny_config(dtype="bfloat16") | {"eos_token_id": [9, 3, 9]}
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
    assert parse_config(fields, generation) == ModelConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=10000.0),
        dtype="bfloat16",
        block_size=8,
        mask_token_id=257,
        eos_token_ids=(3, 9),
        sampling_defaults=(
            ("do_sample", True),
            ("temperature", 0.6),
            ("top_k", 20.0),
            ("top_p", 0.95),
        ),
    )


def test_defaults_of_absent_fields() -> None:
    fields = tiny_config(draft=False)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "eos_token_id"):
        del fields[name]
    config = parse_config(fields)
    assert (config.n_kv_heads, config.head_dim, config.eos_token_ids) == (4, 8, ())
    assert config.tie_word_embeddings is False and config.dtype == "float32"
    assert not config.has_draft_view and config.mask_token_id is None


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_public_configs_are_understood(name: str) -> None:
    config = parse_config(json.loads((CONFIGS / name).read_text()), source=name)
    assert config.dtype == "bfloat16" and config.rope.theta == 1e6 and config.head_dim == 128
    assert config.has_draft_view == name.startswith("orthrus")
    assert config.block_size == (32 if config.has_draft_view else None)
    assert config.mask_token_id == (151669 if config.has_draft_view else None)
    assert config.rope.type == ("yarn" if "yarn" in name else "default")


@pytest.mark.parametrize("name", ["orthrus-1.7b", "qwen3-8b-yarn"])
def test_older_rope_fields_mean_the_same(name: str) -> None:
    old, new = (json.loads((CONFIGS / f"{name}{s}.json").read_text()) for s in ("-older", ""))
    assert parse_config(old) == parse_config(new)


@pytest.mark.parametrize("model_type", ["qwen3", "orthrus"])
@pytest.mark.parametrize("architecture", ["OrthrusLM", None])
def test_either_name_makes_an_orthrus(model_type: str, architecture: str | None) -> None:
    architectures = [architecture] if architecture else None
    fields = tiny_config(model_type=model_type, architectures=architectures)
    assert parse_config(fields).block_size == 8


def test_generation_config_decides_the_end_of_sequence() -> None:
    assert parse_config(tiny_config(), {"eos_token_id": [5, 7]}).eos_token_ids == (5, 7)
    assert parse_config(tiny_config(), {"eos_token_id": 0}).eos_token_ids == (0,)
    assert parse_config(tiny_config(), {"eos_token_id": None}).eos_token_ids == (256,)


def test_older_dtype_field() -> None:
    for name in ("float16", "torch.float16", "half"):
        assert parse_config(tiny_config(torch_dtype=name)).dtype == "float16"
    both = tiny_config(torch_dtype="float16", dtype="bfloat16")
    assert parse_config(both).dtype == "bfloat16"  # as in transformers


@pytest.mark.parametrize(
    "name", ["use_cache", "transformers_version", "auto_map", "max_length", "early_stopping"]
)
def test_fields_without_effect_are_accepted(name: str) -> None:
    assert parse_config(tiny_config(**{name: 1})) == parse_config(tiny_config())


def test_what_training_left_behind_is_ignored_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orthrus_fast")
    fields = tiny_config(r=8, lora_r=8, lora_alpha=1, num_anchors=4, base_params={"a": 1})
    assert parse_config(fields) == parse_config(tiny_config())
    assert caplog.messages == [
        "config.json: base_params, lora_alpha, lora_r, num_anchors, r: of training alone, ignored"
    ]


# What transformers 4.51 writes for PretrainedConfig(), to_json_string(use_diff=False).
DUMPED: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "torch_dtype": None,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None,
    "prefix": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "_name_or_path": "",
    "_attn_implementation_autoset": False,
    "transformers_version": "4.51.0",
}


@pytest.mark.parametrize("generation", [None, {}])
def test_a_config_dumped_whole(generation: dict[str, Any] | None) -> None:
    found = parse_config(tiny_config() | DUMPED, generation)
    expected = parse_config(tiny_config(), generation)
    assert replace(found, sampling_defaults=()) == expected
    params = SamplingParams.from_checkpoint().resolved(dict(found.sampling_defaults))
    assert params.temperature == 0, "do_sample is false, or generation_config.json has nothing"


def test_what_the_installed_transformers_dumps_whole() -> None:
    from transformers import PretrainedConfig, Qwen3Config

    for theirs in (PretrainedConfig(), Qwen3Config()):
        dumped = {k: v for k, v in theirs.to_dict().items() if k not in tiny_config()}
        dumped.pop("layer_types", None)
        assert parse_config(tiny_config() | dumped) == parse_config(tiny_config())


def test_generations_settings_of_config_json_count_where_there_is_no_other_file() -> None:
    fields = tiny_config(do_sample=True, temperature=0.5, repetition_penalty=1.1)
    defaults = dict(parse_config(fields).sampling_defaults)
    assert defaults == {"do_sample": True, "temperature": 0.5, "unserved": "repetition_penalty 1.1"}
    assert parse_config(fields, {}).sampling_defaults == ()


def test_yarn_stretches_the_limit() -> None:
    """As Qwen's card advises: factor 4 of 32768, while max_position_embeddings stays 40960."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for stated, limit in ((40960, 131072), (131072, 131072), (200000, 200000)):
        fields = with_rope(**rope) | {"max_position_embeddings": stated}
        assert parse_config(fields).max_position_embeddings == limit
    plain = tiny_config(max_position_embeddings=40960)
    assert parse_config(plain).max_position_embeddings == 40960
    rope |= {"factor": 9e3, "original_max_position_embeddings": 2**31 - 1}
    assert parse_config(with_rope(**rope)).max_position_embeddings == 2**31 - 1


def test_attn_factor_is_ignored_as_in_transformers(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    expected = parse_config(with_rope(**rope))
    assert caplog.messages == []
    assert parse_config(with_rope(**rope, attn_factor=0.8782488562869419)) == expected
    assert caplog.messages == [
        "config.json: rope_parameters: attn_factor: ignored, as transformers does"
    ]


# What is refused


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "block_size",
        "mask_token_id",
    ],
)
def test_a_needed_field_that_is_absent(name: str) -> None:
    assert refusal(tiny_config(**{name: None})) == f"somewhere/config.json: {name}: absent"


@pytest.mark.parametrize("names", [("model_type", "orthrus"), ("architectures", ["OrthrusLM"])])
def test_an_orthrus_without_both_draft_fields(names: tuple[str, Any]) -> None:
    fields = tiny_config(draft=False) | dict([names])
    assert "block_size: absent" in refusal(fields)
    assert "mask_token_id: absent" in refusal(fields | {"block_size": 8})


@pytest.mark.parametrize(
    "name, absent", [("block_size", "mask_token_id"), ("mask_token_id", "block_size")]
)
def test_one_draft_field_alone_makes_no_plain_qwen3(name: str, absent: str) -> None:
    assert f"{absent}: absent" in refusal(tiny_config(draft=False) | {name: 8})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 1),
        ("vocab_size", 2**40),
        ("vocab_size", "272"),
        ("vocab_size", 272.0),
        ("vocab_size", True),
        ("hidden_size", 0),
        ("hidden_size", 10**4000),
        ("intermediate_size", -1),
        ("intermediate_size", 2**30),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_attention_heads", [4]),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 15),
        ("head_dim", 0),
        ("head_dim", 2**20),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", 1.5),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", False),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 2**31),
        ("tie_word_embeddings", 1),
        ("tie_word_embeddings", "true"),
        ("block_size", 1),
        ("block_size", 2**11),
        ("block_size", 8.0),
        ("mask_token_id", -1),
        ("mask_token_id", 272),
        ("dtype", "int8"),
        ("dtype", "float8_e4m3fn"),
        ("dtype", ["bfloat16"]),
        ("eos_token_id", 272),
        ("eos_token_id", -1),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", True),
        ("model_type", "llama"),
        ("model_type", "qwen3_moe"),
        ("model_type", ["qwen3"]),
        ("architectures", "OrthrusLM"),
        ("architectures", ["Qwen3MoeForCausalLM"]),
        ("architectures", [["OrthrusLM"]]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", 5),
        ("layer_types", {"full_attention": 1}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("rope_local_base_freq", 1e4),
        ("some_field_of_tomorrow", 0),
    ],
)
def test_a_field_out_of_range_is_named(name: str, value: Any) -> None:
    assert f"{name}: " in refusal(tiny_config(**{name: value}))


def test_all_fields_that_are_refused_are_listed_at_once() -> None:
    fields = tiny_config(mlp_bias=True, hidden_act="gelu", of_tomorrow=0, of_next_week={})
    message = refusal(fields)
    assert message.startswith(
        "somewhere/config.json: hidden_act: 'gelu' changes the computation and is not implemented; "
        "mlp_bias: True changes the computation and is not implemented; "
        "of_next_week: not known here, and may change the computation; of_tomorrow: not known here"
    )
    rope = with_rope(rope_type="yarn", factor=2.0, one=1, two=2)
    message = refusal(rope)
    assert "one: not known for rope_type 'yarn'" in message and "two: not known" in message


def test_fields_to_be_ignored() -> None:
    fields = tiny_config(draft=False, of_tomorrow=0, of_next_week={}, auto_map={"A": "m.B"})
    fields["rope_parameters"] = {"rope_theta": 1e4, "of_yesterday": 1}
    message = refusal(fields)
    assert "ignore_config_fields" in message and "--ignore-config-field" in message
    names = ["of_tomorrow", "of_next_week", "of_yesterday", "auto_map"]
    assert parse_config(fields, ignore_fields=names) == parse_config(tiny_config(draft=False))
    for name in names:
        with pytest.raises(ConfigError, match=f"{name}: "):
            parse_config(fields, ignore_fields=set(names) - {name})
    with pytest.raises(ConfigError, match="mlp_bias: True changes the computation"):
        parse_config(tiny_config(mlp_bias=True), ignore_fields=["mlp_bias"])


def test_a_qwen3_with_modelling_code_of_its_own() -> None:
    code = {"AutoModelForCausalLM": "modeling_mine.Qwen3ForCausalLM"}
    assert "auto_map: {'AutoModelForCausalLM': 'modeling_mine.Qwen3ForCausalLM'}" in refusal(
        tiny_config(draft=False, auto_map=code)
    )
    assert parse_config(tiny_config(auto_map=code)) == parse_config(tiny_config())
    assert parse_config(tiny_config(draft=False, auto_map={})).block_size is None


@pytest.mark.parametrize(
    ("fields", "name", "method"),
    [
        ({"quantization_config": {"quant_method": m}}, "quantization_config", m)
        for m in ("fp8", "awq", "gptq", "bitsandbytes")
    ]
    + [
        ({"quantization": {"bits": 4}}, "quantization", "MLX"),
        ({n: {"bits": 4} for n in ("quantization", "quantization_config")}, "", "MLX"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "of an unknown method"),
        ({"quantization_config": 4}, "quantization_config", "of an unknown method"),
    ],
)
def test_quantized_checkpoints(fields: dict[str, Any], name: str, method: str) -> None:
    message = refusal(tiny_config(of_tomorrow=1, **fields))
    assert f"{name}: quantized checkpoints are not supported ({method}); use the bf16" in message
    with pytest.raises(ConfigError, match="quantized"):
        parse_config(tiny_config(**fields), ignore_fields=fields.keys() | {"of_tomorrow"})


@pytest.mark.parametrize(
    ("name", "neutral", "active"),
    [
        ("repetition_penalty", 1.0, 1.3),
        ("encoder_repetition_penalty", 1.0, 1.3),
        ("typical_p", 1.0, 0.9),
        ("guidance_scale", 1, 2.0),
        ("num_beams", 1, 4),
        ("num_beam_groups", 1, 2),
        ("no_repeat_ngram_size", 0, 3),
        ("encoder_no_repeat_ngram_size", 0, 3),
        ("epsilon_cutoff", 0.0, 3e-4),
        ("eta_cutoff", 0.0, 3e-4),
        ("diversity_penalty", 0.0, 1.0),
        ("penalty_alpha", 0, 0.6),
        ("min_length", 0, 5),
        ("min_new_tokens", 0, 5),
        ("bad_words_ids", [], [[3]]),
        ("suppress_tokens", [], [3]),
        ("begin_suppress_tokens", [], [3]),
        ("sequence_bias", {}, [[[3], 2.0]]),
        ("forced_bos_token_id", None, 3),
        ("forced_eos_token_id", None, 3),
        ("exponential_decay_length_penalty", None, [3, 1.1]),
        ("watermarking_config", None, {"bias": 2.0}),
        ("dola_layers", None, "high"),
        ("constraints", None, [1]),
        ("force_words_ids", None, [[3]]),
        ("stop_strings", [], ["\n"]),
        ("token_healing", False, True),
        ("top_h", None, 0.4),
    ],
)
def test_sampling_that_is_not_implemented(name: str, neutral: Any, active: Any) -> None:
    base = {"temperature": 0.6}
    for value in (neutral, None):
        assert parse_config(tiny_config(), base | {name: value}) == parse_config(
            tiny_config(), base
        )
    defaults = dict(parse_config(tiny_config(), base | {name: active}).sampling_defaults)
    for params in (SamplingParams(), SamplingParams(0.6, 20)):
        assert params.resolved(defaults) == params, "who does not ask for it, does not care"
    for params in (SamplingParams.from_checkpoint(), SamplingParams.from_checkpoint(seed=3)):
        with pytest.raises(RequestError) as caught:
            params.resolved(defaults)
        assert f"{name} {active!r}, which is not implemented" in str(caught.value)


def test_every_field_of_transformers_generation_is_thought_of() -> None:
    """What is neither sampled with nor refused concerns lengths, speed, or what is returned."""
    from transformers import GenerationConfig

    harmless = set(
        "max_length max_new_tokens early_stopping max_time use_mtp use_cache cache_implementation "
        "cache_config max_cache_len length_penalty renormalize_logits remove_invalid_values "
        "num_return_sequences output_attentions output_hidden_states output_scores output_logits "
        "return_dict_in_generate pad_token_id bos_token_id decoder_start_token_id is_assistant "
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit target_lookbehind "
        "assistant_lookbehind assistant_ensemble_weight speculation_type compile_config "
        "disable_compile continuous_batching_config low_memory prefill_chunk_size "
        "_from_model_config transformers_version".split()
    )
    served = {"do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id"}
    for name in GenerationConfig().to_dict().keys() - harmless - served:
        defaults = dict(parse_config(tiny_config(), {name: [7]}).sampling_defaults)
        assert "unserved" in defaults, name


def test_a_field_name_cannot_reach_the_terminal() -> None:
    assert r"\x1b[2J\n" in refusal(tiny_config() | {"\x1b[2J\n" + "x" * 9999: 1})


def test_a_config_without_model_type() -> None:
    assert "model_type: None is not supported" in refusal(tiny_config(model_type=None))


@pytest.mark.parametrize("value", [None, False])
def test_a_refused_field_at_its_neutral_value(value: Any) -> None:
    fields = tiny_config() | {
        "attention_bias": value,
        "mlp_bias": value,
        "quantization_config": None,
    }
    assert parse_config(fields) == parse_config(tiny_config())


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_type: 'linear'"),
        ({"rope_type": "llama3"}, "rope_type: 'llama3'"),
        ({"rope_type": ["yarn"]}, "rope_type: ['yarn']"),
        ({"type": "dynamic"}, "rope_type: 'dynamic'"),
        ({"type": "yarn", "rope_type": "default"}, "type: 'yarn' contradicts"),
        ({"factor": 4.0}, "factor: not known for rope_type 'default'"),
        ({"rope_type": "yarn", "low_freq_factor": 1}, "low_freq_factor: not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta: 0 is not between"),
        ({"rope_theta": "1e6"}, "rope_theta: '1e6' is not a number"),
        ({"rope_type": "yarn"}, "factor: absent"),
        ({"rope_type": "yarn", "factor": 0}, "factor: 0 is not between"),
        ({"rope_type": "yarn", "factor": "4"}, "factor: '4' is not a number"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": -1}, "attention_factor: -1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e-308}, "beta_slow: 1e-308"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e30}, "beta_fast: 1e+30"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0}, "mscale: 0"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate: 1 is not true or false"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings: 0",
        ),
    ],
)
def test_rope_fields_are_refused_by_name(rope: dict[str, Any], expected: str) -> None:
    assert f"rope_parameters: {expected}" in refusal(with_rope(**rope))


@pytest.mark.parametrize("value", [0, 0.0, False, "", [], {}])
@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_a_rope_field_that_is_unknown_is_refused_at_any_value(rope_type: str, value: Any) -> None:
    rope = {"rope_type": rope_type} | ({"factor": 2.0} if rope_type == "yarn" else {})
    assert parse_config(with_rope(**rope, of_tomorrow=None)) == parse_config(with_rope(**rope))
    assert f"of_tomorrow: not known for rope_type '{rope_type}'" in refusal(
        with_rope(**rope, of_tomorrow=value)
    )


@pytest.mark.parametrize("value", [0, 0.0, False, "", [], {}])
def test_a_field_that_is_unknown_is_refused_at_any_value(value: Any) -> None:
    assert parse_config(tiny_config() | {"of_tomorrow": None}) == parse_config(tiny_config())
    assert "of_tomorrow: not known here" in refusal(tiny_config(of_tomorrow=value))


def test_rope_forms_that_are_no_objects_or_contradict() -> None:
    assert "rope_parameters: not an object" in refusal(tiny_config(rope_parameters=[1]))
    both = tiny_config(rope_scaling={"rope_type": "yarn"})
    assert "rope_scaling: contradicts rope_parameters" in refusal(both)
    assert "rope_theta: contradicts rope_parameters" in refusal(tiny_config(rope_theta=5e5))
    assert parse_config(tiny_config(rope_theta=1e4)) == parse_config(tiny_config())
    nothing = tiny_config(rope_parameters=None)
    assert "rope_theta: absent" in refusal(nothing)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("top_k", True),
        ("top_p", [0.9]),
        ("temperature", 10**400),
        ("min_p", float("inf")),
        ("eos_token_id", 272),
    ],
)
def test_generation_config_errors_name_that_file(name: str, value: Any) -> None:
    message = refusal(tiny_config(), {name: value})
    assert message.startswith(f"somewhere/generation_config.json: {name}: ")


@given(
    st.dictionaries(
        st.sampled_from([*TINY, "rope_scaling", "rope_theta", "layer_types", "dtype"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_values_parse_or_are_refused(values: dict[str, Any]) -> None:
    try:
        parse_config(tiny_config() | values)
    except ConfigError as error:
        assert str(error).isprintable()


# JSON files that nobody vouches for


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\x80\x04\x95", "not valid JSON"),
        (b'{"a": ' + b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' + b'{"a": ' * 10**6, "nested too deeply"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message and message.isprintable()


def test_json_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: takes no room, and reading it would
    with pytest.raises(CheckpointError, match="config.json: 1099511627776 bytes, over the limit"):
        read_json(path)


def test_json_that_is_absent_or_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: file not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not a file"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_object(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert read_config(tmp_path).vocab_size == 272
    (tmp_path / name).write_text("[1]")
    with pytest.raises(ConfigError, match=f"/{name}: not a JSON object"):
        read_config(tmp_path)


# The RoPE tables against transformers, through both forms of the fields


YARN: list[dict[str, Any]] = [
    {"factor": 4.0},
    {"factor": 4.0, "original_max_position_embeddings": 128},
    {"factor": 8, "original_max_position_embeddings": 64, "beta_fast": 20, "beta_slow": 2.5},
    {"factor": 2.0, "attention_factor": 0.7, "truncate": False},
    {"factor": 3.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"factor": 3.0, "mscale": 0.7},
    {"factor": 4.0, "original_max_position_embeddings": 128, "attn_factor": 0.6},
    {"factor": 0.5},
]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("yarn", [None, *YARN])
def test_rope_tables_equal_transformers(yarn: dict[str, Any] | None, older: bool) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    rope = {"rope_type": "default"} if yarn is None else {"rope_type": "yarn", **yarn}
    if older:
        fields = tiny_config(draft=False, rope_parameters=None, rope_theta=5e4, head_dim=64)
        fields["rope_scaling"] = None if yarn is None else {"type": rope.pop("rope_type"), **rope}
    else:
        rope["rope_theta"] = 5e4
        fields = tiny_config(draft=False, rope_parameters=rope, head_dim=64)
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**json.loads(json.dumps(fields))))
    positions = torch.arange(512)[None]
    for dtype in (torch.float32, torch.bfloat16):
        expected = theirs(torch.empty(1, dtype=dtype), positions)
        for table, wanted in zip(
            rope_table(parse_config(fields), 512, dtype), expected, strict=True
        ):
            assert table.dtype == dtype and torch.equal(table, wanted[0])
