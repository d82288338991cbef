"""The page in headless Chromium: pick, ask, watch, look; at phone width, with the keyboard alone, with a key."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_service import local_app, served
from running_service import TEXTS, add_document

from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from serve.keys import create_key

CHROMIUM = os.environ.get("KVLINK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or say where one is in KVLINK_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def store(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("page") / "store"
    opened = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    for name, text in TEXTS.items():
        add_document(tiny_model, opened, name, text)
    opened.close()
    return where


@pytest.fixture(scope="module")
def url(store: Path, tiny_model: LoadedModel) -> Iterator[str]:
    with served(local_app(tiny_model, store, **{"sampling.max_tokens": 24})) as address:
        yield address


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    yield opened
    context.close()
    assert faults == []


def test_the_page_is_self_contained(url: str) -> None:
    response = httpx.get(url)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href)=["'](?!data:)""", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_pick_ask_watch_and_look(page: Any, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_label(re.compile("harbour")).check()
    page.get_by_label(re.compile("bridge")).check()
    assert "2 picked" in page.locator("#picked").inner_text()
    page.get_by_label(re.compile("Ask about the documents")).fill("Who built the harbour?")
    page.get_by_role("button", name="Ask", exact=True).click()
    picture = page.get_by_role("img", name=re.compile(r"linked .* ms, full prefill .* ms, ratio \d"))
    picture.wait_for(timeout=30_000)
    bars = picture.locator("rect")
    assert bars.count() == 2
    tokens = page.get_by_role("img", name=re.compile(r"^Tokens: \d+ .*, \d+ link and question tokens computed"))
    assert tokens.locator("rect").count() >= 2
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who built the harbour?"}]}
    body |= {"documents": [{"id": "harbour"}, {"id": "bridge"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
    assert page.locator("#answer").text_content() == answer
    assert page.locator("#answer").get_attribute("aria-busy") == "false"
    assert all(each.startswith(url) for each in asked)
    save(page, "desktop")


def test_a_phone_shows_all_of_it(page: Any, url: str) -> None:
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    page.goto(url)
    page.get_by_label(re.compile("harbour")).check()
    page.locator("#question").fill("Who built the harbour?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("img", name=re.compile("ratio")).wait_for(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for button in page.get_by_role("button").all():
        if button.is_visible():
            assert button.bounding_box()["height"] >= 40
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 28)"
    save(page, "phone")


def test_the_keyboard_is_enough(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_label(re.compile("harbour")).wait_for()

    def tab_to(matches: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({matches!r})"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                return
        pytest.fail(f"no way to {matches}")

    tab_to("#documents input")
    page.keyboard.press("Space")
    assert "1 picked" in page.locator("#picked").inner_text()
    tab_to("#question")
    page.keyboard.type("Who?")
    page.keyboard.press("Control+Enter")
    page.get_by_role("img", name=re.compile("ratio")).wait_for(timeout=30_000)


def test_everything_that_can_be_used_has_a_name(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_label(re.compile("harbour")).wait_for()
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button")]
             .filter(e => !(e.labels && e.labels.length) && !e.textContent.trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.get_by_role("heading", level=1).count() == 1


def test_faults_are_said(page: Any, url: str) -> None:
    page.goto(url)
    page.get_by_label(re.compile("harbour")).wait_for()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#question").fill("Who?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("alert").filter(has_text=re.compile(".")).wait_for()
    page.unroute("**/v1/chat/completions")
    cut = 'data: {"choices": [{"index": 0, "delta": {"content": "In "}}]}\n\ndata: {"error": {"message": "gone"}}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=cut, headers={"content-type": "text/event-stream"})
    )
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("alert").filter(has_text="gone").wait_for()
    assert page.locator("#answer").text_content() == "In "


def test_documents_cannot_inject(page: Any, browser: Any, tiny_model: LoadedModel, tmp_path: Path) -> None:
    where = tmp_path / "store"
    opened = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    name = "<img src=x onerror=document.title='owned'>"
    add_document(tiny_model, opened, name, "x")
    opened.close()
    with served(local_app(tiny_model, where)) as address:
        page.goto(address)
        page.get_by_text(name).wait_for()
        assert page.title() == "KVLink"


def test_a_service_with_keys_asks_for_one(page: Any, store: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    _, key = create_key(tmp_path / "keys.json", namespace="default", role="user")
    with served(local_app(tiny_model, store, keys=str(tmp_path / "keys.json"))) as address:
        page.goto(address)
        page.get_by_label(re.compile("API key")).fill(key)
        page.get_by_role("button", name="Use this key").click()
        page.get_by_label(re.compile("harbour")).wait_for()
        assert not page.locator("#login").is_visible()


def save(page: Any, name: str) -> None:
    """Keep a picture, for whoever wants to look."""
    folder = os.environ.get("KVLINK_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
