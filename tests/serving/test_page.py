"""The page in a headless browser, in front of a server of tiny searchers in a process of its own."""

import re
import shutil
from collections.abc import Iterator

import pytest

from retrieval_jax.data.collection import Collection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (Debian's package is `chromium`)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

NAMES = ("bm25", "exact", "naive")


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(start):
    """(process, address) of a server of all three searchers."""
    return start(f"--gin.serve.searchers={NAMES}")


@pytest.fixture
def page(browser, server) -> Iterator["sync_api.Page"]:
    """The page, opened anew. Nothing may be asked of another host, and no script may fail."""
    context = browser.new_context()
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server[1])
    page.get_by_role("checkbox", name="bm25").wait_for()
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((server[1], "data:")) for url in asked)


def search(page: "sync_api.Page", query: str) -> None:
    page.get_by_label("Query").fill(query)
    page.get_by_role("button", name="Search").click()
    page.get_by_role("status").filter(has_text="found by").wait_for()


def found(page: "sync_api.Page", name: str) -> list[str]:
    """The ids of the passages in a searcher's column."""
    hits = page.locator(f"[data-searcher={name}] .hit")
    return [hit.get_attribute("data-docid") for hit in hits.all()]


def test_each_searcher_has_a_column_with_what_it_finds(page, searchers):
    search(page, "progress bar")
    for name in NAMES:
        assert found(page, name) == [p for p, _ in searchers[name].search(["progress bar"], 10)[0]]
    first = page.locator("[data-searcher=bm25] .hit").first
    assert {mark.lower() for mark in first.locator("mark").all_inner_texts()} <= {"progress", "bar", "bars"}
    everywhere = [{*found(page, name)} for name in NAMES]
    only_bm25 = everywhere[0] - everywhere[1] - everywhere[2]
    assert page.locator("[data-searcher=bm25] .badge.only").count() == len(only_bm25)


def test_a_searcher_is_switched_off_and_on(page):
    search(page, "table")
    page.get_by_role("checkbox", name="exact").uncheck()
    page.locator("[data-searcher=exact]").wait_for(state="detached")
    assert page.locator(".column").count() == 2
    page.get_by_role("checkbox", name="exact").check()
    page.locator("[data-searcher=exact] .hit").first.wait_for()


def test_a_judged_query_is_picked_and_its_passages_are_marked(page, served_work):
    collection = Collection(served_work.collection)
    split = next(iter(collection.query_counts))
    query = collection.queries(split)[0]
    page.get_by_role("button", name="Judged queries").click()
    page.get_by_role("dialog").get_by_role("button", name=query.text, exact=True).first.click()
    page.get_by_role("status").filter(has_text="The query is judged").wait_for()
    assert page.get_by_label("Query").input_value() == query.text
    for name in NAMES:
        marked = page.locator(f"[data-searcher={name}] .hit.relevant")
        marked = [hit.get_attribute("data-docid") for hit in marked.all()]
        assert marked == [passage for passage in found(page, name) if query.positives.get(passage, 0) > 0]


def test_a_docid_is_explained_token_by_token(page, searchers):
    page.get_by_role("checkbox", name="Explain").check()
    search(page, "progress bar")
    page.locator("[data-searcher=naive] .docid").first.wait_for()
    (ranked_list,) = searchers["naive"].search(["progress bar"], 10)
    wanted = searchers["naive"].explain("progress bar", ranked_list)
    shown = page.locator("[data-searcher=naive] .docid")
    assert shown.count() == len(ranked_list)
    for docid, expected in zip(shown.all(), wanted["docids"], strict=True):
        assert docid.locator("code").all_inner_texts() == [step["text"] for step in expected["steps"]]
        counts = [
            int(re.match(r"[\d,]+", text)[0].replace(",", ""))
            for text in docid.locator("small:last-child").all_inner_texts()
        ]
        assert counts == [step["passages"] for step in expected["steps"]]
    assert page.locator("[data-searcher=bm25] .docid").count() == 0


def test_a_link_restores_the_view(page, browser):
    page.get_by_role("checkbox", name="Explain").check()
    page.get_by_role("checkbox", name="exact").uncheck()
    page.get_by_label("Passages").select_option("5")
    search(page, "colour & <b>light</b>")
    link, before = page.url, {name: found(page, name) for name in ("bm25", "naive")}
    other = browser.new_context().new_page()
    other.goto(link)
    other.locator("[data-searcher=naive] .docid").first.wait_for()
    other.get_by_role("status").filter(has_text="found by").wait_for()
    assert {name: found(other, name) for name in before} == before
    assert other.get_by_label("Query").input_value() == "colour & <b>light</b>"
    assert other.locator(".column").count() == 2
    assert not other.get_by_role("checkbox", name="exact").is_checked()
    page.get_by_label("Query").fill("table")
    page.get_by_role("button", name="Search").click()
    page.wait_for_url("**q=table**")
    page.go_back()
    page.wait_for_url(link)
    assert page.get_by_label("Query").input_value() == "colour & <b>light</b>"


def test_a_link_to_a_judged_query_of_another_collection_is_searched_for(browser, server):
    page = browser.new_context().new_page()
    page.goto(f"{server[1]}/#q=progress+bar&hits=5&split=no+such+split&n=3")
    page.get_by_role("status").filter(has_text="found by").wait_for()
    assert found(page, "bm25")


def test_an_api_key_is_asked_for_once_and_a_refusal_is_said(browser, start, monkeypatch):
    monkeypatch.setenv("RETRIEVAL_JAX_API_KEY", "a secret")
    _, address = start("--gin.serve.searchers=('bm25',)")
    page = browser.new_context().new_page()
    page.goto(address)
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("status").filter(has_text="API key").wait_for()
    assert not page.get_by_role("dialog").is_visible()
    page.goto(address)
    page.get_by_role("textbox", name="This server asks").fill("a secret")
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("checkbox", name="bm25").wait_for()
    search(page, "table")
    assert found(page, "bm25")


def test_keys_move_between_query_and_passages(page):
    search(page, "progress bar")
    page.keyboard.press("Escape")
    for key, place in (("j", "0-0"), ("j", "0-1"), ("l", "1-1"), ("k", "1-0"), ("h", "0-0")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.place") == place
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"


def test_everything_that_can_be_used_has_a_name(page):
    search(page, "progress bar")
    for control in page.locator("button, input, select").all():
        if control.is_visible():
            name = control.evaluate(
                "e => e.ariaLabel || e.textContent || [...e.labels ?? []].map(l => l.textContent).join()"
            )
            assert name.strip(), control.evaluate("e => e.outerHTML")


def test_a_phone_shows_a_column_at_a_time(browser, server):
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    page.goto(f"{server[1]}/#q=progress+bar&hits=5")
    page.locator("[data-searcher=naive] .hit").first.wait_for()
    assert (
        page.evaluate("document.documentElement.scrollWidth") <= 390
    )  # the columns scroll, the page does not
    assert page.locator(".column").first.bounding_box()["width"] > 300


def test_a_server_that_has_ended_is_said_so(browser, start):
    process, address = start("--gin.serve.searchers=('bm25',)")
    page = browser.new_context().new_page()
    page.goto(address)
    page.get_by_role("checkbox", name="bm25").wait_for()
    process.terminate()
    assert process.wait(20) == 0
    page.get_by_label("Query").fill("table")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("alert").filter(has_text="the server does not answer").wait_for()
