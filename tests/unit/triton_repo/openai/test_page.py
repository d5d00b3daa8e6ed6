"""The page at `/`: what is sent and to whom it is shut, and, in a browser, what is seen and what can be done."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
import uvicorn
from starlette.testclient import TestClient

from ssv.client.triton import Prompt, Reply, ServerError, Settings
from ssv.runtime.fates import FateEntry
from ssv.runtime.request import Fate
from ssv.triton_repo.openai import page
from ssv.triton_repo.openai.app import create_app
from ssv.triton_repo.openai.translation import Models

MODELS = Models("tiny", ("premium", "turbo"), 1700000000, bounds={"turbo": 0.033})
BROWSER = browser.found()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: install it, or set SSV_BROWSER")


def entry(token: str | bytes, fate: Fate, target_pass: int, *dropped: list[str], special: bool = False) -> FateEntry:
    data = token.encode() if isinstance(token, str) else token
    return {
        "token": data.decode(errors="replace"),
        "bytes": None if special else list(data),
        "fate": fate,
        "pass": target_pass,
        "risk": 0.125 if fate in ("trusted", "accepted") else None,
        "dropped": [*dropped],
    }


ANSWER = [
    entry("Rain", "target", 0),
    entry("bow", "accepted", 1, [" s", "x"], ["<b>y</b>"]),
    entry(" is", "corrected", 1, [" was"]),
    entry("\n", "trusted", 2),
    entry(b"\xc3", "trusted", 2),
    entry(b"\xa9", "target", 2),
    entry("<img src=x>", "target", 3),
    entry("<|end|>", "target", 4, special=True),
]
TEXT = "Rainbow is\né<img src=x>"


class Backend:
    """Answers every request alike; `turbo` says another word, and the message "wait" is never answered to its end."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Settings]] = []
        self.given_up = threading.Event()

    async def stream(
        self, prompt: Prompt, settings: Settings, *, request_id: str, stream: bool
    ) -> AsyncGenerator[Reply, None]:
        self.asked.append((prompt, settings))
        (*_, said) = prompt
        if said["content"] == "fail":
            raise ServerError("that is too much", "INVALID_ARGUMENT")
        entries = [*ANSWER]
        if settings.tier == "turbo":
            entries[2] = entry(" was", "trusted", 1)
        numbers = {"num_input_tokens": 3, "judged": 3, "accepted": 1, "unverified": 2, "typical": 0, "cached_tokens": 0}
        tier = settings.tier or "premium"
        about: dict[str, Any] = {"target_passes": 4, "tier": tier, "lossless": tier != "turbo", **numbers}
        if said["content"] == "withdrawn":
            about |= {"tier": "premium", "lossless": True, "withdrawn_tier": tier}
        for i, each in enumerate(entries):
            if said["content"] == "wait" and i == 3:
                try:
                    await asyncio.sleep(600)
                finally:
                    self.given_up.set()
            text = "" if each["bytes"] is None else bytes(each["bytes"]).decode(errors="ignore")
            reason = "stop" if each is entries[-1] else ""
            text = "é" if each["bytes"] == [0xA9] else text
            yield Reply(text=text, finish_reason=reason, num_output_tokens=1, fates=json.dumps([each]), **about)

    async def is_ready(self) -> bool:
        return True

    async def aclose(self) -> None:
        pass


def client(**options: Any) -> TestClient:
    return TestClient(create_app(Backend(), MODELS, **options))


# What is sent.


def test_it_is_one_file_that_names_no_address() -> None:
    response = client().get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?:|//[a-z]|url\(|@import|{{", response.text)
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', response.text)) == {"data:,"}


def test_the_browser_is_told_to_run_nothing_else() -> None:
    response = client().get("/")
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, flags=re.DOTALL)
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert not re.search(r'\bstyle="|\bon[a-z]+="', response.text)  # they would not be run


def test_it_can_be_left_out() -> None:
    assert client(has_page=False).get("/").status_code == 404


def test_it_asks_for_no_key_and_what_it_asks_for_does() -> None:
    asking = client(keys=["sesame"])
    assert asking.get("/").status_code == asking.head("/").status_code == 200
    assert asking.get("/v1/models").status_code == 401
    assert client(keys=["sesame"], has_page=False).get("/").status_code == 401


# What is seen.


@contextmanager
def served(backend: Backend, **options: Any) -> Iterator[str]:
    """The address of a server that runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(backend, MODELS, **options)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}{page.PATH}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    assert BROWSER is not None
    with browser.tab(BROWSER, tmp_path_factory.mktemp("browser")) as tab:
        tab.view(1400)
        yield tab


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def opened(window: browser.Tab, backend: Backend) -> Iterator[browser.Tab]:
    """The page, with its tiers."""
    with served(backend) as url:
        window.open(url)
        window.wait("document.querySelectorAll('#tiers input').length == 4")
        window.errors.clear()
        yield window
        assert not window.errors


def ask(tab: browser.Tab, message: str, tier: str = "premium", beside: str = "") -> None:
    tab.run(
        f"document.querySelector('#tiers input[value={tier}]').click();"
        f"$('beside').value = '{beside}';"
        f"$('message').value = {json.dumps(message)};"
        "$('send').click()"
    )


def told(tab: browser.Tab, answer: int = 0) -> list[list[str]]:
    """Text and classes of an answer's tokens."""
    found: list[list[str]] = tab.run(
        f"[...document.querySelectorAll('.answer')[{answer}].querySelectorAll('.text .token')]"
        ".map((each) => [each.textContent, each.className])"
    )
    return found


@needs_browser
def test_every_token_shows_its_fate(opened: browser.Tab, backend: Backend) -> None:
    ask(opened, "What?")
    opened.wait("!running && document.querySelector('.token.special')")
    assert told(opened) == [
        ["Rain", "token target"],
        ["bow", "token accepted"],
        [" is", "token corrected"],
        ["\n", "token trusted line"],
        ["", "token trusted part"],
        ["é", "token target"],
        ["<img src=x>", "token target"],
        [" <|end|>", "token target special"],
    ]
    ((prompt, settings),) = backend.asked
    assert prompt == [{"role": "user", "content": "What?"}]
    assert settings.fates and settings.tier == "premium" and (settings.temperature, settings.seed) == (0.0, 0)
    shown = opened.run("document.querySelector('.answer').innerText")
    assert "lossless" in shown and "3 (43\N{NO-BREAK SPACE}%)" in shown and "passes saved" in shown


@needs_browser
def test_what_was_drafted_in_vain_is_seen_on_hover_and_by_key(opened: browser.Tab) -> None:
    ask(opened, "What?")
    opened.wait("!running && document.querySelector('.token.special')")
    opened.point(".text .token.accepted")
    opened.wait("!$('tip').hidden")
    tip = "$('tip').innerText"
    assert "the target chose it too" in opened.run(tip) and "12.5\N{NO-BREAK SPACE}%" in opened.run(tip)
    assert opened.run("[...document.querySelectorAll('#tip li')].map((each) => each.textContent)") == [
        " sx",
        "<b>y</b>",
    ]
    opened.press("Escape")
    assert opened.run("$('tip').hidden")
    opened.run("document.querySelector('.text').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        opened.press(key)
    assert "in place of what was drafted" in opened.run(tip)
    assert re.match(r" is The target.s choice in place", opened.run("$('said').textContent"))


@needs_browser
@pytest.mark.parametrize(
    ("beside", "said"),
    [("turbo", "The texts differ from token 3 on."), ("speculative", "Both texts are the same, token for token.")],
)
def test_two_tiers_answer_beside_each_other(opened: browser.Tab, backend: Backend, beside: str, said: str) -> None:
    ask(opened, "What?", "premium", beside)
    opened.wait("!running && document.querySelector('.same')")
    assert [settings.tier for _, settings in backend.asked] == ["premium", beside]
    assert opened.run("document.querySelector('.same').textContent") == said
    left, right = opened.run(
        "[...document.querySelectorAll('.answer')].map((each) => each.getBoundingClientRect().toJSON())"
    )
    assert left["top"] == right["top"] and left["right"] < right["left"]
    assert ("divergence at most 3.3\N{NO-BREAK SPACE}%" in opened.run("document.body.innerText")) == (beside == "turbo")


@needs_browser
def test_a_tier_that_is_withdrawn_is_named(opened: browser.Tab) -> None:
    ask(opened, "withdrawn", "turbo")
    opened.wait("!running && document.querySelector('.token.special')")
    said = opened.run("document.querySelector('.answer h2 span').textContent")
    assert said.startswith("turbo is withdrawn, decoded by premium; lossless")


@needs_browser
def test_a_chat_goes_on_with_each_tiers_own_answer(opened: browser.Tab, backend: Backend) -> None:
    ask(opened, "One", "premium", "turbo")
    opened.wait("!running && document.querySelector('.same')")
    ask(opened, "Two", "turbo", "premium")
    opened.wait("!running && document.querySelectorAll('.same').length == 2")
    said = [[each["content"] for each in prompt] for prompt, _ in backend.asked]
    assert said[2] == ["One", TEXT, "Two"]
    assert said[3] == ["One", TEXT.replace(" is", " was"), "Two"]
    opened.run("$('anew').click()")
    ask(opened, "Three")
    opened.wait("!running && document.querySelector('.token.special')")
    assert [each["content"] for each in backend.asked[-1][0]] == ["Three"]


@needs_browser
def test_an_answer_can_be_stopped(opened: browser.Tab, backend: Backend) -> None:
    ask(opened, "wait", "premium", "turbo")
    opened.wait("document.querySelectorAll('.text .token').length == 3")
    opened.run("$('stop').click()")
    opened.wait("!running && document.querySelector('.failed')")
    assert backend.given_up.wait(browser.SECONDS)
    assert opened.run("document.querySelectorAll('.answer').length") == 1
    assert len(backend.asked) == 1


@needs_browser
def test_an_error_is_shown_with_the_servers_words(window: browser.Tab, backend: Backend) -> None:
    with served(backend) as url:
        window.open(url)
        window.wait("document.querySelectorAll('#tiers input').length == 4")
        ask(window, "fail")
        window.wait("!running && document.querySelector('.failed')")
        assert window.run("document.querySelector('.failed').textContent") == "No answer: that is too much"


@needs_browser
def test_a_server_with_keys_is_asked_with_one(window: browser.Tab, backend: Backend) -> None:
    with served(backend, keys=["sesame"]) as url:
        window.open(url)
        for key, is_known in (("wrong", False), ("sesame", True)):
            window.wait("!$('key-form').hidden && $('settings').hidden")
            window.run(f"$('key').value = '{key}'; document.querySelector('#key-form button').click()")
            note = "$('key-note').textContent.includes('does not know')"
            window.wait("$('key-form').hidden" if is_known else note)
        ask(window, "What?")
        window.wait("!running && document.querySelector('.token.special')")
    assert len(backend.asked) == 1


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it(opened: browser.Tab, dark: bool, tmp_path: Path) -> None:
    try:
        opened.view(390, 844, dark=dark)
        ask(opened, "What? " * 40, "premium", "turbo")
        opened.wait("!running && document.querySelector('.same')")
        assert opened.run("document.documentElement.scrollWidth") == 390
        top, below = opened.run(
            "[...document.querySelectorAll('.answer')].map((each) => each.getBoundingClientRect().toJSON())"
        )
        assert below["top"] > top["bottom"]
        opened.picture(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").read_bytes().startswith(b"\x89PNG")
    finally:
        opened.view(1400)
