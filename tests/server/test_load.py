"""Many clients at a time, a third of whom leave: nothing stuck, nothing left behind, same texts."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthrus_fast import Decoder, SamplingParams
from tests.server.serving import Running, fronting, load, until, write_chatting

pytestmark = pytest.mark.slow
N_REQUESTS = 96
Case = tuple[dict[str, Any], int | None]  # a body, and events after which its client leaves


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatting(tmp_path_factory.mktemp("chatting") / "model")


def cases() -> list[Case]:
    draw = random.Random(7)
    made: list[Case] = []
    for number in range(N_REQUESTS):
        prompt = [draw.randrange(250) for _ in range(draw.choice([1, 5, 40, 300]))]
        budget = draw.choice([1, 5, 20, 60])
        body = {"prompt": prompt, "max_tokens": budget, "seed": number, "temperature": 0.9}
        body |= {"stream": number % 4 != 0, "mode": draw.choice(["ar", "diffusion"])}
        made.append((body, draw.randrange(3) if number % 3 == 0 else None))
    return made


async def ask(client: httpx.AsyncClient, url: str, body: Any, leave_after: int | None) -> str:
    """The text, as far as the client stayed for it."""
    if not body["stream"]:
        if leave_after is not None:
            try:
                await client.post(url, json=body, timeout=0.02)
            except httpx.TimeoutException:
                return ""
        answer = (await client.post(url, json=body)).json()
        return str(answer["choices"][0]["text"])
    text, n_events = "", 0
    async with client.stream("POST", url, json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if n_events == leave_after or line == "data: [DONE]":
                break
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
                n_events += 1
    return text


async def all_at_once(running: Running, n_clients: int) -> list[str]:
    """Texts of all cases, by so many clients, each with a request after another."""
    texts, waiting = [""] * N_REQUESTS, iter(list(enumerate(cases())))
    limits = httpx.Limits(max_connections=n_clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:

        async def client() -> None:
            for place, (body, leave_after) in waiting:
                url = f"{running.url}/v1/completions"
                texts[place] = await ask(http, url, body, leave_after)

        await asyncio.gather(*(client() for _ in range(n_clients)))
    return texts


def alone(decoder: Decoder, body: dict[str, Any]) -> str:
    params = SamplingParams(0.9, seed=body["seed"])
    return decoder.generate(body["prompt"], body["max_tokens"], params, "ar").text


@pytest.mark.parametrize("n_clients", [1, 8, 64])
def test_a_load_leaves_nothing_and_changes_no_text(checkpoint: Path, n_clients: int) -> None:
    solo, decoder = load(checkpoint, prefix_reuse=False), load(checkpoint, slots=4)
    with fronting(decoder) as (running, _):
        texts = asyncio.run(all_at_once(running, n_clients))
        for text, (body, leave_after) in zip(texts, cases(), strict=True):
            expected = alone(solo, body)
            assert text == expected if leave_after is None else expected.startswith(text)
        until(lambda: not decoder.engine.has_work)
        assert decoder._inboxes == {}
        metrics = httpx.get(f"{running.url}/metrics").text
        assert "orthrus_running 0.0" in metrics and "orthrus_waiting 0.0" in metrics


def test_equal_requests_wait_equally(checkpoint: Path) -> None:
    """First come, first served: with 16 clients on 4 slots nobody is passed over."""
    decoder = load(checkpoint, slots=4)
    body = {"prompt": [1, 2, 3], "max_tokens": 30, "stream": False, "mode": "ar"}
    ended: list[int] = []

    async def client(http: httpx.AsyncClient, url: str, number: int) -> None:
        for _ in range(4):
            await http.post(url, json={**body, "seed": number})
            ended.append(number)

    async def everybody(url: str) -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            await asyncio.gather(*(client(http, url, number) for number in range(16)))

    with fronting(decoder) as (running, _):
        asyncio.run(everybody(f"{running.url}/v1/completions"))
    for round_end in (16, 32, 48):  # when so many have ended, nobody is a round behind
        counts = [ended[:round_end].count(number) for number in range(16)]
        assert max(counts) - min(counts) <= 1
