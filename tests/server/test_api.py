"""OpenAI's endpoints through the official client, against the decoder alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from orthrus_fast import Decoder, SamplingParams
from orthrus_fast.server.protocol import seed_of
from tests.server.serving import Running, fronting, load, serving, telling, write_chatting

HELLO: Any = [{"role": "user", "content": "Hello"}]
SAMPLED: Any = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatting(tmp_path_factory.mktemp("chatting") / "model")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Decoder:
    return load(checkpoint, prefix_reuse=False)


@pytest.fixture(scope="module", params=["here", "behind a front"])
def running(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    decoder = load(checkpoint, slots=3)
    if request.param == "here":
        with serving(decoder) as running:
            yield running
    else:
        with fronting(decoder) as (running, _):
            yield running


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.client()


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 24}
    return client.chat.completions.create(**{**body, **settings})


def complete(client: openai.OpenAI, **settings: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 20}
    return client.completions.create(**{**body, **settings})


def test_a_chat_is_what_the_decoder_says(client: openai.OpenAI, alone: Decoder) -> None:
    answer = chat(client, **SAMPLED)
    expected = alone.generate(HELLO, 24, SamplingParams(**SAMPLED))
    [choice] = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.message.tool_calls is None
    assert answer.usage.prompt_tokens == len(alone.encode(HELLO))
    assert answer.usage.completion_tokens == 24 and answer.system_fingerprint == "fp_tiny"
    assert choice.orthrus["seed"] == 7 and choice.orthrus["cycles"] <= 23


def test_a_stream_is_the_same_text(client: openai.OpenAI, alone: Decoder) -> None:
    options = {"include_usage": True}
    chunks = list(chat(client, stream=True, stream_options=options, **SAMPLED))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == alone.generate(HELLO, 24, SamplingParams(**SAMPLED)).text
    assert choices[0].delta.role == "assistant"
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert sum(choice.orthrus["n_tokens"] for choice in choices[1:]) == 24
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24


def test_completions_of_several_prompts_and_choices(client: openai.OpenAI, alone: Decoder) -> None:
    prompts: Any = ["Once", "Twice"]
    answer = complete(client, prompt=prompts, n=2, **SAMPLED)
    expected = [
        alone.generate(prompt, 20, SamplingParams(**{**SAMPLED, "seed": seed_of(7, i)})).text
        for prompt in prompts
        for i in range(2)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 4
    assert answer.usage.prompt_tokens == 9 and answer.usage.completion_tokens == 80
    by_ids = complete(client, prompt=[5, 6, 7])
    assert by_ids.choices[0].text == alone.generate([5, 6, 7], 20).text
    streamed: dict[int, str] = {}
    for chunk in complete(client, prompt=prompts, n=2, stream=True, **SAMPLED):
        [choice] = chunk.choices
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(4)] == expected


def test_a_completion_has_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Once")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_a_chat_goes_on_as_far_as_it_fits(running: Running) -> None:
    answer = chat(running.client(), max_completion_tokens=None)
    assert answer.usage.total_tokens == running.decoder.max_seq_len


def test_the_first_choice_has_the_seed_itself_and_a_seed_may_be_negative() -> None:
    assert seed_of(5, 0) == 5 and seed_of(-1, 0) == 2**64 - 1
    assert len({seed_of(5, i) for i in range(100)} | {seed_of(6, i) for i in range(100)}) == 200


def test_a_seed_is_drawn_and_told(client: openai.OpenAI, alone: Decoder) -> None:
    first, second = (chat(client, temperature=1.0).choices[0] for _ in range(2))
    assert first.orthrus["seed"] != second.orthrus["seed"]
    params = SamplingParams(1.0, seed=first.orthrus["seed"])
    assert alone.generate(HELLO, 24, params).text == first.message.content


def test_log_probabilities_of_the_chosen_tokens(client: openai.OpenAI, alone: Decoder) -> None:
    expected = alone.generate(HELLO, 24, SamplingParams(**SAMPLED, logprobs=True))
    entries = chat(client, logprobs=True, top_logprobs=0, **SAMPLED).choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == expected.logprobs
    assert bytes(b for entry in entries for b in entry.bytes) == bytes(
        token for token in expected.tokens if token < 256
    )
    streamed = [
        entry.logprob
        for chunk in chat(client, logprobs=True, stream=True, **SAMPLED)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == expected.logprobs
    listed = complete(client, logprobs=0).choices[0].logprobs
    assert len(listed.tokens) == len(listed.token_logprobs) == 20


def test_the_same_seed_gives_the_same_text_under_any_load(running: Running, alone: Decoder) -> None:
    def ask(number: int) -> tuple[str, str]:
        prompt = [3, number % 5, 9] * (1 + 7 * number % 11)
        settings = {"temperature": 0.9, "seed": number}
        mode = ("ar", "diffusion")[number % 2]
        how = {"prompt": prompt, "extra_body": {"mode": mode}, **settings}
        expected = texts[number]
        if number % 3:
            return complete(running.client(), **how).choices[0].text, expected
        chunks = complete(running.client(), stream=True, **how)
        return "".join(chunk.choices[0].text for chunk in chunks), expected

    prompts = [[3, number % 5, 9] * (1 + 7 * number % 11) for number in range(24)]
    texts = [
        alone.generate(prompt, 20, SamplingParams(0.9, seed=number), "ar").text
        for number, prompt in enumerate(prompts)
    ]
    with ThreadPoolExecutor(12) as threads:
        for text, expected in threads.map(ask, range(24)):
            assert text == expected


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    prompt = list(range(100, 180))
    complete(client, prompt=prompt, max_tokens=4)
    usage = complete(client, prompt=[*prompt, 3], max_tokens=4).usage
    assert usage.prompt_tokens_details.cached_tokens == 80


def test_a_stop_string_ends_the_text(running: Running) -> None:
    with telling(running.decoder, "one two three four"):
        for stream in (False, True):
            answer = chat(running.client(), stop=["hree", "zz"], stream=stream)
            choices = [c.choices[0] for c in (answer if stream else [answer])]
            texts = [(c.delta if stream else c.message).content or "" for c in choices]
            assert "".join(texts) == "one two t"
            assert choices[-1].finish_reason == "stop"


CALLING = (
    "<think>\nI add.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>§'
)


def test_thoughts_and_calls_are_told_apart(running: Running) -> None:
    with telling(running.decoder, CALLING):
        how = {"tools": TOOLS, "stop": "§", "max_completion_tokens": 200}
        [choice] = chat(running.client(), **how).choices
        assert choice.finish_reason == "tool_calls"
        message = choice.message
        assert message.content == "Let me see." and message.reasoning_content == "I add."
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        assert calls == [("add", '{"a": 1, "b": 2}'), ("add", "{}")]
        assert len({call.id for call in message.tool_calls}) == 2
        content, reasoning, streamed = "", "", []
        for chunk in chat(running.client(), stream=True, **how):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", "")
            streamed += [(c.index, c.function.arguments) for c in delta.tool_calls or ()]
        assert (content, reasoning) == ("Let me see.", "I add.")
        assert streamed == [(0, '{"a": 1, "b": 2}'), (1, "{}")]
        [choice] = chat(running.client(), **{**how, "tool_choice": "none"}).choices
        assert choice.finish_reason == "stop" and "<tool_call>" in choice.message.content


def without_nothing(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value not in (None, [])}


def test_an_agent_calls_a_tool_and_goes_on(running: Running) -> None:
    """A turn with calls goes back with all the fields that the client's own type has."""
    client, messages = running.client(), list(HELLO)
    with telling(running.decoder, CALLING):
        how = {"tools": TOOLS, "stop": "§", "max_completion_tokens": 200}
        message = chat(client, messages=messages, **how).choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        total = sum(json.loads(call.function.arguments).values())
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})
    with telling(running.decoder, "It is 3.§"):
        answer = chat(client, messages=messages, **how)
    assert answer.choices[0].message.content == "It is 3."
    expected = running.decoder.encode([without_nothing(one) for one in messages], tools=TOOLS)
    assert answer.usage.prompt_tokens == len(expected)


def test_thinking_is_the_templates_argument(running: Running) -> None:
    template = running.decoder.encode(HELLO, enable_thinking=False)
    assert bytes(template).endswith(b"</think>\n\n")
    answer = chat(running.client(), extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert answer.usage.prompt_tokens == len(template)


def test_parts_of_text_and_a_developers_message(client: openai.OpenAI, alone: Decoder) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
    ]
    same: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hel\nlo"}]
    text = alone.generate(same, 24).text
    assert chat(client, messages=messages).choices[0].message.content == text


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.modes == ["diffusion", "ar"]
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_texts_of_another_fingerprint_are_refused(client: openai.OpenAI) -> None:
    assert chat(client, extra_body={"system_fingerprint": "fp_tiny"}).choices
    with pytest.raises(openai.NotFoundError, match="'fp_other' is not served here; 'fp_tiny' is"):
        complete(client, extra_body={"system_fingerprint": "fp_other"})


@pytest.mark.parametrize(
    "settings, field, message",
    [
        ({"presence_penalty": 0.5}, "presence_penalty", "not served"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not served"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not served"),
        (
            {"response_format": {"type": "xml"}},
            None,
            "response_format: type 'xml' is not supported",
        ),
        ({"response_format": {"type": "json_schema"}}, None, "not an object with a schema"),
        ({"response_format": {"type": "regex", "regex": "("}}, None, "needs an end-of-sequence id"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs", "0"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice", "'auto' or 'none'"),
        ({"temperature": -1}, None, "temperature"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"n": 0}, "n", "1"),
        ({"max_tokens": 3}, None, "differs from max_completion_tokens"),
        ({"stop": [""]}, None, "stop"),
        ({"stop": ["x"] * 17}, None, "at most 16"),
        ({"extra_body": {"mode": "fast"}}, "mode", "'diffusion' or 'ar'"),
        ({"extra_body": {"beams": 3}}, "beams", "not served"),
        ({"extra_body": {"chat_template_kwargs": {"messages": "x"}}}, None, "not one of"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "image_url"),
        ({"max_completion_tokens": 4000}, None, "+ max_new_tokens 4000 = 40"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_served_is_refused_by_name(
    client: openai.OpenAI, settings: dict[str, Any], field: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert message in str(caught.value) and caught.value.param == field
    assert caught.value.type == "invalid_request_error"


def test_what_asks_for_nothing_is_let_through(client: openai.OpenAI) -> None:
    chat(client, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me", n=1)
    chat(client, parallel_tool_calls=True, response_format={"type": "text"}, store=False)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "grace"]}, "born": {"enum": [1815, 1906]}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a model whose texts may end."""
    checkpoint = write_chatting(tmp_path_factory.mktemp("ending") / "model", eos=[256])
    with serving(load(checkpoint, slots=3)) as running:
        yield running.client()


def test_a_grammar_that_is_damaged_is_refused(ending: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="grammar: regex"):
        chat(ending, response_format={"type": "regex", "regex": "("})


@pytest.mark.parametrize("seed", range(3))
def test_a_text_is_as_its_response_format_says(ending: openai.OpenAI, seed: int) -> None:
    """Streamed or not, in both modes the same text."""
    client = ending
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    how = {"response_format": format, "temperature": 1.5, "seed": seed}
    how |= {"max_completion_tokens": 200}
    texts = set()
    for mode in ("diffusion", "ar"):
        whole = chat(client, **how, extra_body={"mode": mode})
        texts.add(whole.choices[0].message.content)
        assert whole.choices[0].finish_reason == "stop"
    stream = chat(client, **how, stream=True)
    texts.add("".join(part.choices[0].delta.content or "" for part in stream if part.choices))
    [text] = texts
    person = json.loads(text)
    assert person.keys() == {"name", "born"}
    assert person["name"] in ("ada", "grace") and person["born"] in (1815, 1906)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.code == "model_not_found"


@pytest.mark.slow
def test_a_client_of_another_make(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for it
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    how = {"model": "openai/tiny", "api_base": f"{running.url}/v1", "api_key": "none"}
    how |= {"messages": HELLO, "max_tokens": 20, "seed": 3, "temperature": 1.0}
    whole = litellm.completion(**how)
    text = "".join(
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(**how, stream=True)
    )
    assert whole.choices[0].message.content == text and text
    assert whole.usage.completion_tokens == 20
    with telling(running.decoder, CALLING):
        calling = litellm.completion(**{**how, "max_tokens": 200}, tools=TOOLS, stop=["§"])
    assert calling.choices[0].finish_reason == "tool_calls"
    assert [one.function.name for one in calling.choices[0].message.tool_calls] == ["add", "add"]
    with pytest.raises(litellm.BadRequestError, match="penalty: not served"):
        litellm.completion(**how, frequency_penalty=1)
