"""The page, driven in a browser: type, send, blocks, stop, seeds, keys, markup, a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orthrus_fast import Decoder
from orthrus_fast.server.access import Access
from tests.embedded import MODEL
from tests.server.serving import Running, load, serving, telling, until, write_chatting

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
KEY = "a-key-of-some-length"
TABLE = "Convert to JSON:\n\nname,age\nAnn,31\nBob,45"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def embedded() -> Iterator[Running]:
    with serving(load(MODEL, slots=2), model="embedded") as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load(write_chatting(tmp_path_factory.mktemp("chatting") / "model"))


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test on any error, and on a request to anywhere else."""
    page = browser.new_page(viewport={"width": 800, "height": 780})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    hosts: set[str] = set()
    yield page
    page.close()
    assert problems == [] and hosts <= {"127.0.0.1"}


def ask(page: Any, text: str, **settings: str) -> None:
    for name, value in settings.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def answer(page: Any, number: int = -1) -> str:
    """The text of an answer, once it has ended."""
    page.wait_for_function("() => !document.getElementById('send').disabled")
    return str(page.locator(".answer").nth(number).locator(".text").first.text_content())


def test_a_table_is_converted_block_by_block(embedded: Running, page: Any, tmp_path: Path) -> None:
    page.goto(embedded.url)
    page.get_by_label("Show blocks").check()
    ask(page, TABLE)
    page.wait_for_selector(".answer .block")
    text = answer(page)
    expected = embedded.decoder.generate([{"role": "user", "content": TABLE}])
    assert text == expected.text
    assert 2 <= page.locator(".answer .block").count() <= len(expected.tokens)
    assert page.locator(".answer .draft").count() > 0
    facts = page.locator(".answer .facts").first.text_content()
    assert f"{len(expected.tokens)} tokens ·" in facts and "tokens per cycle" in facts
    page.get_by_role("button", name="Same seed again").click()
    page.wait_for_selector(".verdict")
    assert page.locator(".verdict").text_content() == "the same text"
    page.get_by_role("button", name="Compare with mode ar").click()
    page.wait_for_function("() => document.querySelectorAll('.verdict').length == 2")
    assert "the same text · drafting" in page.locator(".verdict").nth(1).text_content()
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_a_seed_says_which_text(tiny: Decoder, page: Any) -> None:
    with serving(tiny) as running:
        page.goto(running.url)
        texts = []
        for seed in ("5", "6", "5"):
            page.get_by_role("button", name="New chat").click()
            ask(page, "Hello", temperature="1", seed=seed, limit="40")
            texts.append(answer(page))
        assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_text(tiny: Decoder, page: Any, how: str) -> None:
    with serving(tiny) as running:
        page.goto(running.url)
        ask(page, "Hello")
        page.wait_for_selector(".answer .block")
        if how == "key":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Stop").click()
        page.wait_for_function("() => !document.getElementById('send').disabled")
        until(lambda: not tiny.engine.has_work)
        assert "stopped" in page.locator(".answer .facts").first.text_content()


@pytest.mark.parametrize(
    "text", ["<b id=evil>x</b><img src=x onerror=evil()>", "</script><script>"]
)
def test_text_is_no_markup(tiny: Decoder, page: Any, text: str) -> None:
    with serving(tiny) as running, telling(tiny, text):
        page.goto(running.url)
        ask(page, text, limit="60")
        assert answer(page) == text
        assert page.locator(".user .text").text_content() == text
        assert page.locator("#evil, #log img, #log script").count() == 0


def test_a_key_is_asked_for(tiny: Decoder, page: Any) -> None:
    with serving(tiny, access=Access(keys=(KEY,))) as running:
        page.goto(running.url)
        page.wait_for_selector("#key:visible")
        page.locator("#key").fill(KEY)
        page.locator("#key").blur()
        page.wait_for_function(
            "() => document.getElementById('model').textContent.includes('tiny')"
        )
        ask(page, "Hello", limit="5")
        answer(page)
        assert "5 tokens" in page.locator(".answer .facts").first.text_content()


def test_an_error_is_told_and_the_message_kept(tiny: Decoder, page: Any) -> None:
    with serving(tiny) as running:
        page.goto(running.url)
        ask(page, "Hello", limit="99999")
        page.wait_for_selector(".error")
        assert "max_new_tokens 99999" in page.locator(".error").text_content()
        assert page.locator("#prompt").input_value() == "Hello"


def test_it_fits_a_phone(embedded: Running, page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 780})
    page.goto(embedded.url)
    page.wait_for_function("() => document.getElementById('prompt').value.includes('CSV')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send["x"] + send["width"] <= 390 and send["y"] + send["height"] <= 780
    page.get_by_text("Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
