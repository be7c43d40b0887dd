"""tokenizer.py against the tokenizers library, transformers, and files that mean harm."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from orthrus_fast.errors import CheckpointError, PromptError, TemplateError
from orthrus_fast.tokenizer import Detokenizer, Tokenizer, _guard

FIXTURES = Path(__file__).parents[1] / "fixtures" / "chat"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Hello, world! 12 it's  fine\n\n",
    "日本語のテキスト 🙂🙃 çà é",
    "def f(x):\n    return x",
]
CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <b>things</b> & 'more' – ünïcode",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}


def train() -> tokenizers.Tokenizer:
    """A byte-level BPE with Qwen's pre-tokenizer, and one special and some plain added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    plain = ["<think>", "</think>", "é", "日本", "with space é"]
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    backend.add_special_tokens(["<|spécial|>"])
    return backend


def write(
    directory: Path,
    *,
    backend: tokenizers.Tokenizer | None = None,
    config: Any = CONFIG,
    template: str | None = None,
    **fields: Any,
) -> Path:
    """A checkpoint's tokenizer files; ``fields`` replaces top-level fields of tokenizer.json."""
    directory.mkdir(exist_ok=True, parents=True)
    content = json.loads((backend or train()).to_str()) | fields
    (directory / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def plain_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tokenizer(plain_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(plain_directory)


@pytest.fixture(scope="module")
def judge(plain_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(plain_directory)


@pytest.fixture(scope="module")
def library(plain_directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(plain_directory / "tokenizer.json"))


# Text to ids.

SNIPPETS = st.sampled_from(["<|im_end|>", "<think>", "<|im_st", "é", "日本", "\r\n "])
TEXTS = st.lists(st.text(max_size=12) | SNIPPETS).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_encode_equals_transformers(tokenizer: Tokenizer, judge: Any, text: str) -> None:
    assert tokenizer.encode(text) == judge(text).input_ids


def test_special_tokens_in_text_become_ids(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("<|im_end|>")
    assert len(end) == 1
    assert tokenizer.encode("a<|im_end|>b")[1:-1] == end


def test_encode_adds_what_the_post_processor_adds_and_encode_chat_does_not(tmp_path: Path) -> None:
    backend = train()
    bos = backend.token_to_id("<|im_start|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    write(tmp_path, backend=backend, template="{{ messages[0].content }}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    message = {"role": "user", "content": "x"}
    assert tokenizer.encode("x") == [bos, *tokenizer.encode_chat([message])]


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    backend = train()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_directory(write(tmp_path, backend=backend))
    assert tokenizer.decode(tokenizer.encode("Hello, world! 1234")) == "Hello, world! 1234"
    assert 2 < len(tokenizer.encode("Hello, world! 1234")) < 50


def test_lone_surrogates_and_other_types_are_prompt_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="prompt: character 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(PromptError, match="prompt: bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_special_tokens_that_only_the_config_names_are_added_as_transformers_does(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    fields = {"mask_token": "<|mask|>", "eos_token": "<|im_end|>"}
    write(tmp_path, config=CONFIG | fields)
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a<|mask|>b") == theirs("a<|mask|>b").input_ids
    assert ours.decode(ours.encode("a<|mask|>b")) == "ab"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


TOKEN = {"content": "<|new|>", "lstrip": True, "rstrip": False, "normalized": False}
TOKEN_FIELDS: list[dict[str, Any]] = [
    {"additional_special_tokens": ["<|new|>", "<|b|>"]},
    {"extra_special_tokens": ["<|b|>", "<|new|>", "</think>"]},
    {"extra_special_tokens": {"image_token": "<|new|>", "other": "<|b|>"}},
    {"extra_special_tokens": ["<|new|>"], "additional_special_tokens": ["<|b|>"]},
    {"extra_special_tokens": [{"__type": "AddedToken", **TOKEN}]},
    {"mask_token": "<|new|>", "image_token": "<|a|>", "bos_token": "<|b|>"},
    {"num_image_token": 256, "some_token": ["<|new|>"], "add_bos_token": True},
    {"split_special_tokens": True, "extra_special_tokens": ["<|new|>"]},
]


@pytest.mark.parametrize("fields", TOKEN_FIELDS)
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added_tokens": {"<|b|>": 328, "<|new|>": 327, "<|é|>": 329, "<think>": 322}},
        {"special_tokens_map": {"eos_token": TOKEN, "additional_special_tokens": ["<|a|>"]}},
        {"special_tokens_map": {"extra_special_tokens": ["<|a|>"], "pad_token": "<|b|>"}},
        {
            "special_tokens_map": {"sep_token": "<|b|>"},
            "added_tokens": {"<|a|>": 327, "<|b|>": 328},
        },
    ],
)
def test_tokens_that_other_files_name_are_added_as_transformers_does(
    tmp_path: Path, fields: dict[str, Any], files: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    config = {name: value for name, value in CONFIG.items() if value is not None} | fields
    write(tmp_path, config=config)
    for name, content in files.items():
        write_json(tmp_path / f"{name}.json", content)
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "x<|a|>y<|e\u0301|>  <|b|>\u0065\u0301</think><|im_end|><think> <|new|>z"
    tokens = ours.encode(text)
    assert tokens == theirs(text).input_ids
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


def test_older_files_count_only_where_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    added = {
        str(i): {"content": token.content, "special": token.special}
        for i, token in train().get_added_tokens_decoder().items()
    }
    write(tmp_path, config=CONFIG | {"added_tokens_decoder": added})
    write_json(tmp_path / "added_tokens.json", {"<|new|>": 327})
    write_json(tmp_path / "special_tokens_map.json", {"sep_token": "<|b|>"})
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("x<|b|><|new|>") == theirs("x<|b|><|new|>").input_ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<|new|>": 500}, "'<|new|>': id 500 is not .* (327)"),
        ("added_tokens.json", {"<|new|>": 1}, "'<|new|>': id 1 is not .* (327)"),
        ("added_tokens.json", {"<think>": 323}, "'<think>': id 323 is not .* (322)"),
        ("added_tokens.json", {"": 327}, "'': id 327 is not"),
        ("added_tokens.json", {"<|new|>": "327"}, "not an object of ids"),
        ("added_tokens.json", ["<|new|>"], "not a JSON object"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token: neither"),
        ("special_tokens_map.json", {"additional_special_tokens": [5]}, "extra_special_tokens"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens: neither"),
        ("tokenizer_config.json", {"extra_special_tokens": [""]}, "extra_special_tokens: neither"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer"),
    ],
)
def test_tokens_that_contradict_tokenizer_json_are_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    write_json(write(tmp_path) / name, content)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*{pattern}|{pattern}"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_split_special_tokens_holds_for_chats_too(tmp_path: Path, split: bool) -> None:
    from transformers import AutoTokenizer

    template = (FIXTURES / "chatml.jinja").read_text()
    write(tmp_path, config=CONFIG | {"split_special_tokens": split}, template=template)
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    messages = [USER | {"content": "a<|im_end|>b"}]
    tokens = ours.encode_chat(messages)
    assert tokens == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert (2 in tokens) != split


# Ids to text.


IDS = st.integers(0, 360) | st.sampled_from([10**6, 2**31, 2**40])


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(IDS), skip=st.booleans())
def test_pieces_joined_equal_decode_and_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, tokens: list[int], skip: bool
) -> None:
    stream = tokenizer.detokenizer(skip_special=skip)
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special=skip)
    known = [token for token in tokens if token < 2**32]
    assert "".join(pieces) == library.decode(known, skip_special_tokens=skip)


@settings(max_examples=400, deadline=None)
@given(
    data=st.lists(
        st.sampled_from(list(b"\x00a\x7f\x80\xbf\xc0\xc2\xe0\xa0\xed\xef\xf0\x90\xf4\x8f\xf5\xff"))
    ).map(bytes)
)
def test_invalid_bytes_equal_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, data: bytes
) -> None:
    alphabet = {byte: character for character, byte in tokenizer._byte_of.items()}
    ids = library.get_vocab()
    tokens = [ids[alphabet[byte]] for byte in data]
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, tokens)) + stream.finish() == library.decode(tokens)


def test_byte_alphabet_is_the_librarys(tokenizer: Tokenizer) -> None:
    assert set(tokenizer._byte_of) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(tokenizer._byte_of.values()) == list(range(256))


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("𝄞")  # not in the corpus: four tokens, one a byte
    assert len(tokens) == 4
    stream = tokenizer.detokenizer()
    assert [stream.push(token) for token in tokens] == ["", "", "", "𝄞"]
    assert stream.finish() == ""


def test_an_unfinished_character_is_held_back_and_then_replaced(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("<|im_end|>")
    tokens = [*tokenizer.encode("a"), *tokenizer.encode("𝄞")[:2], *end]
    stream = tokenizer.detokenizer()
    assert [stream.push(token) for token in tokens] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"
    assert tokenizer.decode(tokens) == "a\ufffd"
    assert tokenizer.decode(tokens, skip_special=False) == "a\ufffd<|im_end|>"


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_decode_gives_back_normalized_text(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    expected = unicodedata.normalize("NFC", text)
    decoded = tokenizer.decode(tokenizer.encode(text))
    # The library reads the added token "é" as the byte E9: only such texts are not given back.
    assert decoded == expected or "é" in expected or not unicodedata.is_normalized("NFC", text)


def test_detokenizing_does_not_slow_down_with_length(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("Hello, world! 🙂 " * 200)

    class Counting:
        calls = 0

        def __call__(self, token: int) -> bytes:
            self.calls += 1
            return tokenizer.bytes_of(token)

    count = Counting()
    stream = Detokenizer(count)
    pieces = [stream.push(token) for token in tokens]
    assert count.calls == len(tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_clean_up_is_ignored_as_transformers_ignores_it_for_bpe(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, config=CONFIG | {"clean_up_tokenization_spaces": True})
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tokens = ours.encode("Hello , world ! it 's")
    assert ours.decode(tokens) == theirs.decode(tokens) == "Hello , world ! it 's"


# Damaged and hostile files.


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"model": {"type": "BPE"}}', b"[" * 100_000,
     b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}'],
)  # fmt: skip
def test_a_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: [^\n]*\Z"):
        Tokenizer.from_directory(tmp_path)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.json: file not found"):
        Tokenizer.from_directory(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(CheckpointError, match="tokenizer.json: .* over the limit"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer.json: not a file"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("decoder", None, "decoder: NoneType"),
        ("decoder", {"type": "Fuse"}, "decoder: Fuse"),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, "Replace"),
        ("normalizer", {"type": "Sequence", "normalizers": []}, "normalizer: Sequence"),
    ],
)
def test_unsupported_parts(tmp_path: Path, field: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer.json: .*{message}"):
        Tokenizer.from_directory(write(tmp_path, **{field: value}))


def test_dropout_is_refused(tmp_path: Path) -> None:
    model = json.loads(train().to_str())["model"] | {"dropout": 0.5}
    with pytest.raises(CheckpointError, match="model.dropout"):
        Tokenizer.from_directory(write(tmp_path, model=model))


def test_a_ctrl_c_within_the_library_is_no_checkpoint_error() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _guard(Path("tokenizer.json"), interrupt)


def test_a_panic_of_the_library_is_a_checkpoint_error(tmp_path: Path) -> None:
    backend = train()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    tokenizer = Tokenizer.from_directory(write(tmp_path, backend=backend))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*retry-limit"):
        tokenizer.encode("a" * 45 + "b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "not a JSON object"),
        ({"eos_token": 7}, "eos_token"),
        ({"eos_token": {"text": "x"}}, "eos_token"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"0": {"content": "other", "special": True}}}, "0: not as in"),
        ({"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": False}}}, "0: not"),
        ({"added_tokens_decoder": {"²": {"content": "a", "special": False}}}, "not as in"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template"),
        ({"chat_template": ["x"]}, "chat_template"),
        ({"chat_template": "x" * 300_000}, "chat_template"),
    ],
)
def test_a_damaged_tokenizer_config(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{message}"):
        Tokenizer.from_directory(write(tmp_path, config=config))


def test_added_tokens_of_both_files_may_agree(tmp_path: Path) -> None:
    config = CONFIG | {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}}
    assert Tokenizer.from_directory(write(tmp_path, config=config)).encode("<|endoftext|>") == [0]


# Chat templates.

USER = {"role": "user", "content": "Hi, <you> & \"me\" 'x' – 🙂"}
SYSTEM = {"role": "system", "content": " Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nlong\n</think>\n\nHello!"}
ARGUMENTS = {"q": "ü", "n": [1, None, 2.5]}
CALL = {"type": "function", "function": {"name": "find", "arguments": ARGUMENTS}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "empty system": [{"role": "system", "content": ""}, USER],
    "turns": [SYSTEM, USER, THOUGHT, USER | {"content": "and?"}],
    "ends with assistant": [USER, {"role": "assistant", "content": "yes", "reasoning": "why\n"}],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "<tool_response>2"},
        THOUGHT,
    ],
}
TEMPLATES = sorted(path.stem for path in FIXTURES.glob("*.jinja"))
TEMPLATE_CONFIG = CONFIG | {
    "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False,
                  "normalized": False, "rstrip": False, "single_word": False},
    "mask_token": "<|endoftext|>",
    "boi_token": "<|spécial|>",
}  # fmt: skip


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    template = (FIXTURES / f"{request.param}.jinja").read_text()
    directory = write(tmp_path_factory.mktemp("chat"), config=TEMPLATE_CONFIG, template=template)
    return Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


def skip_where_fields_are_handed_on_as_they_are() -> None:
    """Python 3.10 has no transformers that drops None and renames reasoning before rendering."""
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        pytest.skip("transformers before 5.23 hands None and reasoning fields on as they are")


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [], [TOOL, TOOL]])
def test_render_chat_equals_transformers(pair: tuple[Any, Any], name: str, tools: Any) -> None:
    if name in ("ends with assistant", "tools"):
        skip_where_fields_are_handed_on_as_they_are()
    ours, theirs = pair
    messages = CONVERSATIONS[name]
    before = json.dumps(messages)
    mentions = ours.chat_template.mentions
    if tools and not mentions("tools"):
        with pytest.raises(PromptError, match="^tools: the chat template has no such variable"):
            ours.render_chat(messages, tools=tools)
        tools = None
    all_options: tuple[dict[str, Any], ...] = (
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False, "custom": [1, "x"], "date_string": "today"},
        {"enable_thinking": True, "eos_token": "<end>"},
    )
    for chosen in all_options:
        known = ("add_generation_prompt",)
        options = {k: v for k, v in chosen.items() if k in known or mentions(k)}
        expected_options = {"add_generation_prompt": True, "tools": tools} | options
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **expected_options)
        except Exception:
            assert "tools" in name  # some templates cannot do what tools need
            with pytest.raises(TemplateError):
                ours.render_chat(messages, tools=tools, **options)
            continue
        assert ours.render_chat(messages, tools=tools, **options) == expected
        ids = theirs.apply_chat_template(messages, return_dict=False, **expected_options)
        assert ours.encode_chat(messages, tools=tools, **options) == ids
    assert json.dumps(messages) == before


PIECES = st.sampled_from(["<think>", "</think>", "\n", " ", "<tool_response>", "</tool_response>"])
CONTENT = st.lists(st.text(max_size=5) | PIECES, max_size=5).map("".join)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT},
    optional={"reasoning_content": CONTENT, "thinking": st.none() | CONTENT},
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=5), thinking=st.none() | st.booleans())
def test_random_chats_equal_transformers(
    qwen3: tuple[Any, Any], messages: list[dict[str, Any]], thinking: bool | None
) -> None:
    skip_where_fields_are_handed_on_as_they_are()
    ours, theirs = qwen3
    options = {} if thinking is None else {"enable_thinking": thinking}
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    assert ours.render_chat(messages, enable_thinking=thinking) == expected


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    template = (FIXTURES / "qwen3.jinja").read_text()
    directory = write(tmp_path_factory.mktemp("qwen3"), template=template)
    return Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


def test_a_long_chat_stays_far_below_the_limits(qwen3: tuple[Any, Any]) -> None:
    messages = [USER, {"role": "assistant", "content": "x" * 2000}] * 1000
    started = time.thread_time()
    assert len(qwen3[0].render_chat(messages)) > 2_000_000
    assert time.thread_time() - started < 1.0


def render(directory: Path, template: str, messages: Any = None, **options: Any) -> str:
    tokenizer = Tokenizer.from_directory(write(directory, template=template))
    return tokenizer.render_chat([USER] if messages is None else messages, **options)


def test_where_templates_come_from(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    names = {"default": "D", "tool_use": "T{{ tools | length }}"}
    forms = [{"name": name, "template": template} for name, template in names.items()]
    cases: list[tuple[Any, str]] = [(None, "D"), ([], "T0"), ([TOOL], "T1")]
    for form in (forms, names):
        write(tmp_path, config=CONFIG | {"chat_template": form})
        ours = Tokenizer.from_directory(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        for tools, expected in cases:
            assert ours.has_chat_template and ours.render_chat([USER], tools=tools) == expected
            if form is forms:  # transformers 5 fails on a dict
                assert theirs.apply_chat_template([USER], tools=tools, tokenize=False) == expected
    write(tmp_path, config=CONFIG | {"chat_template": "string"})
    assert Tokenizer.from_directory(tmp_path).render_chat([USER]) == "string"
    write(tmp_path, config=CONFIG | {"chat_template": forms}, template="file{{ tools }}")
    assert Tokenizer.from_directory(tmp_path).render_chat([USER], tools=[]) == "file[]"


def test_additional_templates_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = {"tool_use": "T{{ tools | length }}", "default": "D2{{ tools }}", "rag": "R"}
    config = CONFIG | {"chat_template": "config{{ tools }}"}
    for i, names in enumerate([(), ("tool_use",), ("tool_use", "rag"), ("tool_use", "default")]):
        for template in (None, "D{{ tools }}"):
            directory = write(tmp_path / f"{i}{template is None}", config=config, template=template)
            (directory / "additional_chat_templates").mkdir()
            for name in names:
                file = directory / "additional_chat_templates" / f"{name}.jinja"
                file.write_text(files[name])
            ours = Tokenizer.from_directory(directory)
            theirs = AutoTokenizer.from_pretrained(directory)
            choices: tuple[Any, ...] = (None, [], [TOOL])
            for tools in choices:
                try:
                    expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False)
                except ValueError as error:  # only templates of other names
                    assert "no default" in str(error)
                    with pytest.raises(TemplateError, match="no chat template but tool_use"):
                        ours.render_chat([USER], tools=tools)
                else:
                    assert ours.render_chat([USER], tools=tools) == expected


def test_a_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}{{ x }}"}
    config = CONFIG | {"chat_template": template}
    tokenizer = Tokenizer.from_directory(write(tmp_path, config=config))
    compiled = []
    compile_template = Environment.compile

    def counting(self: Environment, *args: Any, **options: Any) -> Any:
        compiled.append(args)
        return compile_template(self, *args, **options)

    monkeypatch.setattr(Environment, "compile", counting)
    for i in range(3):
        assert tokenizer.render_chat([USER | {"content": f"{i}"}]) == f"{i}"
        assert tokenizer.render_chat([USER], tools=[TOOL], x=i).endswith(f"]{i}")
        assert tokenizer.chat_template.mentions("x")
    assert len(compiled) == 2


def test_variables_that_the_template_does_not_mention_are_refused(tmp_path: Path) -> None:
    template = "{% set a = a if a is defined else 1 %}{% if b %}{{ [a, b] | tojson }}{% endif %}"
    template += "{# tools #}{{ 'c' }}{% for d in messages %}{{ d.content }}{% endfor %}"
    assert render(tmp_path, template, a=2, b=None, enable_thinking=None, tools=None)[0] == "c"
    assert render(tmp_path, template, b=3).startswith("[1, 3]c")
    for name in ("c", "d", "content", "enable_thinking", "documents", "bos_token"):
        with pytest.raises(PromptError, match=f"^{name}: the chat template has no such variable"):
            render(tmp_path, template, **{name: [True]})
    with pytest.raises(PromptError, match="^tools: the chat template has no such variable"):
        render(tmp_path, template, tools=[TOOL])
    assert render(tmp_path, template, tools=[]).startswith("c")


THINKING = {
    "<think>{{ x }}": False,
    "{{ enable_thinking }}": False,
    "{% set a = enable_thinking %}the same": False,
    "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}": True,
    "{% if enable_thinking is defined and enable_thinking %}on{% endif %}": False,
    "{% if enable_thinking | default(true) %}on{% endif %}": True,
    "{{ raise_exception('no') }}{{ enable_thinking }}": False,
    "{% if enable_thinking %}": False,
}


@pytest.mark.parametrize("template", THINKING)
def test_whether_a_template_thinks_by_default(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path, template=template))
    assert tokenizer.thinks_by_default() == THINKING[template]


def test_qwen3_thinks_by_default_and_no_template_does_not(
    qwen3: tuple[Any, Any], tokenizer: Tokenizer
) -> None:
    assert qwen3[0].thinks_by_default() and not tokenizer.thinks_by_default()


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "cache_control": None} for text in texts]


def test_parts_of_text_are_joined_where_the_template_takes_text(qwen3: tuple[Any, Any]) -> None:
    tokenizer = qwen3[0]
    contents: tuple[Any, ...] = (parts("a", "b"), tuple(parts("a", "b")))
    for content in contents:
        messages = [SYSTEM, USER | {"content": content}]
        assert tokenizer.render_chat(messages) == tokenizer.render_chat(
            [SYSTEM, USER | {"content": "a\nb"}]
        )
        assert messages[1]["content"] is content
    empty = tokenizer.render_chat([USER | {"content": []}])
    assert empty == tokenizer.render_chat([USER | {"content": ""}])


def test_parts_reach_a_template_that_takes_nothing_else(tmp_path: Path) -> None:
    only = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    message = USER | {"content": parts("a", "b")}
    assert render(tmp_path, only, [message]) == "ab"
    strict = "{{ raise_exception('no system') if messages[0].role != 'system' }}"
    strict += "{{ messages[1].content }}"
    assert render(tmp_path, strict, [SYSTEM, message]) == "a\nb"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "'text'"),
        ({"type": "text", "text": None}, "'text'"),
        ({"text": "x"}, "None"),
        ("text", "'str'"),
        (None, "'NoneType'"),
    ],
)
def test_other_parts_are_refused_by_name(qwen3: tuple[Any, Any], part: Any, kind: str) -> None:
    messages = [SYSTEM, USER | {"content": [*parts("a"), part]}]
    with pytest.raises(PromptError, match=rf"^messages\[1\]: content\[1\]: {kind} is not a part"):
        qwen3[0].render_chat(messages)


def test_no_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert not tokenizer.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.render_chat([USER])
    write(tmp_path, config=CONFIG | {"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(TemplateError, match="no chat template"):
        Tokenizer.from_directory(tmp_path).render_chat([USER])


def test_a_template_file_that_is_too_large_or_not_text(tmp_path: Path) -> None:
    for content, message in ((b"x" * (2**18 + 1), "over the limit"), (b"\xff", "not UTF-8")):
        (write(tmp_path) / "chat_template.jinja").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: .*{message}"):
            Tokenizer.from_directory(tmp_path)


def test_messages_are_plain_copies(tmp_path: Path) -> None:
    class Role(str, Enum):
        USER = "user"

    message = {"role": Role.USER, "data": ("a", 1, 2.5, True)}
    text = render(tmp_path, "{{ messages[0].role }} {{ messages[0].data }}", [message])
    assert text == "user ('a', 1, 2.5, True)"


@pytest.mark.parametrize(
    "messages",
    [None, "text", [], {}, [1], ["user"], [{}], [{"role": 1}], [{"content": "x"}], [USER, None],
     [USER | {"content": object()}], [USER | {"content": b"x"}]],
)  # fmt: skip
def test_messages_of_the_wrong_form(tokenizer: Tokenizer, messages: Any) -> None:
    with pytest.raises(PromptError, match="^messages"):
        tokenizer.render_chat(messages)


def test_other_arguments_of_the_wrong_form(tokenizer: Tokenizer) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(PromptError, match="nested too deeply"):
        tokenizer.render_chat([USER | {"content": cyclic}])
    with pytest.raises(PromptError, match="tools"):
        tokenizer.render_chat([USER], tools=[print])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="tools"):
        tokenizer.render_chat([USER], tools=["find"])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="variable 'x'"):
        tokenizer.render_chat([USER], x=object())


def test_a_rendering_with_lone_surrogates_is_a_prompt_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="prompt: character 1 is a lone surrogate"):
        render(tmp_path, "x{{ messages[0].content }}", [USER | {"content": "\udc80"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\nb\n{% if %}", "line 3: "),
        ("{% for x in messages %}", "line 1: "),
        ("{{ messages | nothing }}", "line 1: No filter named 'nothing'"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", ""),
        ("{% import '/etc/passwd' as x %}", ""),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
        ("{% if 1 %}" * 300 + "{% endif %}" * 300, ""),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, ""),
        ("{{ 1" + " + 1" * 20000 + " }}", ""),
        ("{{ strftime_now(5) }}", ""),
        ("{{ messages | tojson(indent=[]) }}", ""),
    ],
)
def test_broken_templates(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(tmp_path, template)
    text = str(caught.value)
    assert "chat_template.jinja: chat template: " in text
    assert message in text and "\n" not in text and len(text) < 1200


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']",
        "'' | attr('__class__')",
        "cycler.__init__.__globals__",
        "joiner.__init__.__globals__.os",
        "namespace.__init__.__globals__",
        "namespace.mro()",
        "dict.__globals__",
        "range.__globals__",
        "raise_exception.__globals__",
        "strftime_now.__closure__",
        "strftime_now.__code__",
        "''.format.__self__",
        "''.format.__globals__",
        "'{0.__class__}'.format('')",
        "'{0.__class__.__mro__}'.format('')",
        "'{a.__class__}'.format_map({'a': 1})",
        "('{0' ~ '.__class__}').format('')",
        "'{0[__class__]}'.format('')",
        "(['{0.__class__}'] | map('format', '') | first) and ''.__class__",
        "messages | map(attribute='__class__') | list",
        "messages.append(1)",
        "messages[0].update(role='system')",
        "messages[0].pop('role')",
        "messages.clear()",
        "messages.sort()",
        "messages | attr('append')",
        "self.__init__",
        "self._TemplateReference__context",
        "loop.__class__",
        "messages | map('attr', '__class__') | list",
        "lipsum.__globals__",
        "caller.__call__",
    ],
)
def test_reaching_out_of_the_sandbox(tmp_path: Path, expression: str) -> None:
    with pytest.raises(TemplateError):
        render(tmp_path, "{{ " + expression + " }}")


HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{% set x = [1] * 10**10 %}",
    "{{ 10**(10**10) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.*f' % (10**9, 1.0) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '%*d' | format(10**9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:.1000000000f}'.format(1.0) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'a\nb' | indent(10**10) }}",
    "{{ [1] | tojson(indent=10**10) }}",
    "{{ [1] | batch(10**10, 'x') | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ lipsum(10**9) }}",
    "{{ ('a' * 2**20).replace('a', 'b' * 2**20) | length }}",
    "{{ ('a' * 2**20).replace('', 'b' * 2**20) | length }}",
    "{{ ('a' * 2**20) | replace('a', 'b' * 2**20) | length }}",
    "{{ ('b' * 2**20).join('a' * 2**20) | length }}",
    "{{ ('b' * 2**20).join(['a'] * 2**20) | length }}",
    "{{ (['a'] * 2**20) | join('b' * 2**20) | length }}",
    "{{ (['a'] * 2**20) | map('upper') | join('b' * 2**20) | length }}",
    "{{ ('\\n' * 2**20) | indent('b' * 2**20) | length }}",
    "{{ ('a' * 2**20).translate({97: 'b' * 2**20}) | length }}",
    "{% for i in range(9999) %}" + "y" * 100_000 + "{% endfor %}",
    # Widths and texts by ways around the plain ones.
    "{{ ('a' | safe).center(10**10) }}",
    "{{ 'a'.encode().center(10**10) }}",
    "{{ '%1000000000d'.encode() % 1 }}",
    "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ '{:１０００００００００}'.format(1) }}",
    "{{ ('{:1000000000}' | safe).format(1) }}",
    "{{ ['a'] | map('center', 10**10) | first }}",
    "{{ ('a' | attr('center'))(10**10) }}",
    "{{ 'a' | center(width=10**10) }}",
    "{{ 5 | round(-10**9) }}",
    "{{ (5).to_bytes(10**10, 'big') }}",
    "{{ ('a' * 2**20) | replace(new='b' * 2**20, old='a') | length }}",
    "{{ ('1' * 2**20) | replace(1, 'b' * 2**20) | length }}",
    "{{ ('\\t' * 2**20).expandtabs(9999) | length }}",
    "{{ ('\\n' * 2**20) | indent(9999) | length }}",
    "{{ ('a ' * 2**19) | wordwrap(1, true, 'b' * 2**20) | length }}",
    "{{ ('http://a.com ' * 2**10) | urlize(rel='b' * 2**20) | length }}",
    "{{ ('\\0' * 2**20).translate(['b' * 2**20]) | length }}",
    "{{ ([1] * 2**18) | tojson(indent=9999) | length }}",
    "{{ ([1] * 2**18) | tojson(separators=('b' * 2**20, ':')) | length }}",
    "{{ ('{0}' * 2**18).format('a' * 2**20) | length }}",
    "{{ (('%s' * 2**18) % (('a' * 2**20,) * 2**18)) | length }}",
    "{{ (('%(a)s' * 2**17) % {'a': 'a' * 2**20}) | length }}",
    "{{ ('{0:9999}' * 2**16).format(1) | length }}",
    "{{ ([1] * 2**16) | map('center', 9999) | list | length }}",
    "{{ (['a' * 2**20] * 2**20) | select | join | length }}",
    "{{ ([[1] * 2**17] * 2**12) | sum(start=[]) | length }}",
    "{{ ''.join((['a' * 2**20] * 2**20) | select) | length }}",
    "{% set x = 'a' * 2**20 %}{{ (" + " ~ ".join(["x"] * 999) + ") | length }}",
]
DOUBLING = [
    "ns.x + ns.x",
    "ns.x ~ ns.x",
    "'%s%s' % (ns.x, ns.x)",
    "'%s%s' | format(ns.x, ns.x)",
    "'{0}{0}'.format(ns.x)",
    "[ns.x, ns.x] | join",
    "''.join([ns.x, ns.x])",
    "[ns.x, ns.x] | string",
    "ns.x.replace('', ns.x)",
    "twice(ns.x)",
]
HOSTILE += [
    "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='ab') %}"
    "{% for i in range(64) %}{% set ns.x = " + expression + " %}{% endfor %}"
    for expression in DOUBLING
]
HOSTILE += [
    "{% set ns = namespace(x='ab') %}{% for i in range(64) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% autoescape true %}{% set ns = namespace(x='ab') %}{% for i in range(64) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endautoescape %}",
]
# A list of 64 levels that would be 2**64 texts.
WRITING = [
    "ns.x",
    "ns.x | string",
    "ns.x | tojson",
    "ns.x | pprint",
    "ns.x | upper",
    "[ns.x] | join('a')",
    "ns.x | map('string') | list",
    "'' ~ ns.x",
    "'%s' % ns.x",
    "'%s' | format(ns.x)",
    "'{}'.format(ns.x)",
    "raise_exception(ns.x)",
    "messages[ns.x].y",
    "[ns.x, ns.x] | sum(start=[])",
]
HOSTILE += [
    "{% set ns = namespace(x=['a']) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ " + expression + " }}"
    for expression in WRITING
]
# Not huge at once, but together.
HOSTILE += [
    "{% set x = 'a' * 2**20 %}{% set ns = namespace(l=[]) %}{% for i in range(10**5) %}"
    "{% set ns.l = [" + expression + ", ns.l] %}{% endfor %}"
    for expression in ("x ~ i", "x + 'a'", "x[i:]", "x | upper", "x.upper()", "([1] * 2**17)[i:]")
]


@pytest.mark.parametrize("template", HOSTILE)
def test_huge_values_are_refused_before_they_are_made(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path, template=template))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError, match=r"^[^\n]+$") as caught:
        tokenizer.render_chat([USER])
    assert "out of memory" not in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak  # KiB on Linux
    assert grown < (400 * 2**10 if sys.platform == "linux" else 400 * 2**20)


def test_texts_of_a_usual_length_are_replaced_and_joined(tmp_path: Path) -> None:
    template = (
        "{{ 'a-b'.replace('-', '<think>') }} {{ 'a-b' | replace('-', '+') }} "
        "{{ ', '.join(['a', 'b']) }} {{ ['a', 'b'] | join('; ') }} {{ 'ab' | join }} "
        "{{ 'a\\nb' | indent('  ') }} "
        "{{ 'ab'.translate({97: 'A'}) }} {{ ('x' * 2**20).replace('x', '') | length }} "
        "{{ ('x' * 2**20).replace('y', 'z' * 99) | length }}"
    )
    assert render(tmp_path, template) == "a<think>b a+b a, b a; b ab a\n  b Ab 0 1048576"


def test_a_namespace_does_not_write_its_values(tmp_path: Path) -> None:
    text = render(tmp_path, "{% set ns = namespace(x='secret') %}{{ ns }} {{ ns.x }}")
    assert text.startswith("<") and text.count("secret") == 1


def test_numbers_that_make_nothing_are_free(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = (
        "{{ x | default(32768) }} {{ '{{\"name\": \"{}\"}}'.format('f') }} "
        "{{ 'Cutoff 20250131: %s 100%%' % x }} {{ '{0:*^9}{x[12345]}'.format(1, x={12345: 2}) }} "
        "{% set c = messages[0].content %}{{ c.find('x', c | length - 5) }} {{ c | truncate(12345) "
        "| length }} {{ c | wordwrap(12345) | length }} {{ '%05d' % 123456 }} {{ 12345 * 12345 }} "
        "{{ ('%(a)s (20250131d) 20250131' % {'a': 1}) }} {{ '99999' | int(12345) + 10**9 % 77777 }}"
    )
    messages = [USER | {"content": "y" * 20_000 + "x"}]
    ours = Tokenizer.from_directory(write(tmp_path, template=template))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_widths_are_limited(tmp_path: Path) -> None:
    for expression in ("'a'.center({})", "'a' | center({})", "'%{}d' % 1", "'{{:{}}}'.format(1)"):
        fits = "{{ (" + expression.format(9999) + ") | length }}"
        assert render(tmp_path, fits) == "9999"
        with pytest.raises(TemplateError, match="a number above 9999"):
            render(tmp_path, fits.replace("9999", "10000"))


def test_enable_thinking_is_undefined_unless_given(tmp_path: Path) -> None:
    template = "{{ enable_thinking is defined }} {{ enable_thinking }}"
    assert render(tmp_path, template) == "False "
    assert render(tmp_path, template, enable_thinking=False) == "True False"
