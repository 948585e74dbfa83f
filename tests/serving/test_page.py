"""The page in a headless browser, in front of a server of tiny searchers in a process of its own."""

import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from retrieval_jax.data.collection import Collection
from retrieval_jax.search.searcher import Searcher

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


@pytest.fixture(scope="module")
def weighing_server(start, weighing) -> tuple[str, dict[str, Searcher]]:
    """The address of a server of searchers that weigh tokens, which finds few passages; the searchers."""
    exports = tuple(map(str, weighing.values()))
    given = ("searchers=('bm25',)", f"exports={exports}", "max_hits=7", "batch_sizes=(1,)")
    _, address = start(*(f"--gin.serve.{setting}" for setting in given))
    return address, {name: Searcher.open(folder) for name, folder in weighing.items()}


def chips(tokens: "sync_api.Locator") -> list[tuple[str, float]]:
    """The tokens of a list with their numbers."""
    texts = [chip.locator("code").inner_text() for chip in tokens.locator("li").all()]
    return [*zip(texts, map(float, tokens.locator("small").all_inner_texts()), strict=True)]


def rounded(tokens: list[dict]) -> list[tuple[str, float]]:
    return [(token["text"], pytest.approx(token["score"], abs=0.0051)) for token in tokens]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_plan_of_a_planned_searcher_is_shown(browser, weighing_server, scheme):
    address, searchers = weighing_server
    (ranked_list,) = searchers["planned"].search(["progress bar"], 7)
    why = searchers["planned"].explain("progress bar", ranked_list)
    plan, ranks = why["plan"], {passage: rank for rank, (passage, _) in enumerate(ranked_list, start=1)}
    assert {docid["plan_rank"] is None for docid in why["docids"]} == {True, False}  # both are shown
    assert {one["passage"] in ranks for one in plan["first"]} == {True, False}
    page = browser.new_context(color_scheme=scheme).new_page()
    page.goto(f"{address}/#q=progress+bar&explain=1&s=planned")
    column = page.locator("[data-searcher=planned]")
    column.locator("details summary").filter(has_text=f"The plan: {plan['passages']} passages").wait_for()
    assert chips(column.get_by_role("list", name="The query's tokens that count")) == rounded(plan["tokens"])
    rows = column.get_by_role("list", name="The first passages of the plan").get_by_role("listitem").all()
    for nth, (row, passage) in enumerate(zip(rows, plan["first"], strict=True), start=1):
        text = row.inner_text()
        assert text.startswith(f"{nth}. ")
        assert passage["passage"] in text
        assert f"{passage['lexical']:.2f}" in text
        assert ("followed" in text) == (passage["followed"] == passage["tokens"])
        if passage["followed"] < passage["tokens"]:
            assert f"left after {passage['followed']} of {passage['tokens']} tokens" in text
        rank = ranks.get(passage["passage"])
        assert row.get_by_role("button").count() == (rank is not None)
        if rank:
            assert f"found at rank {rank}" in text
            row.get_by_role("button", name=passage["passage"]).click()
            assert page.evaluate("document.activeElement.dataset.docid") == passage["passage"]
    for hit, docid in zip(column.locator(".hit").all(), why["docids"], strict=True):
        rank, sequential = docid["plan_rank"], sum(step["log_prob"] for step in docid["steps"])
        text = hit.locator(".parts").inner_text()
        assert (f"rank {rank} in the plan" if rank else "not in the plan") in text
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", text)]  # the sum's parts, then the product's
        wanted = [docid["lexical"], 0.5 * sequential, 0.5, sequential]
        np.testing.assert_allclose(numbers, wanted, atol=0.0051)
        steps = hit.get_by_role("list", name="The docid, token by token").locator("code")
        assert steps.all_inner_texts() == [step["text"] for step in docid["steps"]]
        tokens = hit.get_by_role("list", name="The passage's tokens that count")
        assert chips(tokens) == rounded(docid["tokens"])


def test_the_tokens_that_a_lexical_searcher_weighs_are_shown(browser, weighing_server):
    address, searchers = weighing_server
    why = searchers["lexical"].explain("progress bar", searchers["lexical"].search(["progress bar"], 7)[0])
    page = browser.new_context().new_page()
    page.goto(f"{address}/#q=progress+bar&explain=1")
    column = page.locator("[data-searcher=lexical]")
    column.locator("details summary").wait_for()
    assert chips(column.get_by_role("list", name="The query's tokens that count")) == rounded(why["tokens"])
    for hit, docid in zip(column.locator(".hit").all(), why["docids"], strict=True):
        tokens = hit.get_by_role("list", name="The passage's tokens that count")
        assert chips(tokens) == rounded(docid["tokens"])
        assert hit.locator(".parts").count() == 0
    assert page.locator("[data-searcher=bm25] details").count() == 0


def test_what_the_parts_of_a_fused_searcher_add_is_shown(browser, weighing_server):
    address, searchers = weighing_server
    why = searchers["fused"].explain("progress bar", searchers["fused"].search(["progress bar"], 7)[0])
    page = browser.new_context().new_page()
    page.goto(f"{address}/#q=progress+bar&explain=1&s=fused")
    page.locator("[data-searcher=fused] .parts").first.wait_for()
    for hit, docid in zip(page.locator("[data-searcher=fused] .hit").all(), why["docids"], strict=True):
        text = hit.locator(".parts").inner_text()
        for part in docid["parts"]:
            rank = "not found" if part["rank"] is None else f"rank {part['rank']}"
            assert f"{part['part']}: {rank}, adds {part['adds']:.3f}" in text


@pytest.mark.parametrize(
    "why",
    [
        {"why": "so"},
        {"docids": 7, "certain": 3},
        {"docids": [None], "tokens": 2, "plan": "none"},
        {"docids": [{"steps": [3]}], "tokens": ["a", "b"]},
    ],
)
def test_an_explanation_of_another_form_is_not_drawn(why, page, searchers):
    def answer(route):
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | {"explanation": why})

    page.route("**/v1/bm25/search?*", answer)
    page.get_by_role("checkbox", name="Explain").check()
    search(page, "progress bar")
    assert found(page, "bm25") == [p for p, _ in searchers["bm25"].search(["progress bar"], 10)[0]]
    assert page.locator("[data-searcher=bm25]").locator(".docid, .plan").count() == 0


def test_no_more_passages_are_offered_than_the_server_finds(browser, weighing_server):
    address, _ = weighing_server
    for link, chosen in (("#q=table", "7"), ("#q=table&hits=50", "7"), ("#q=table&hits=5", "5")):
        page = browser.new_context().new_page()
        page.goto(f"{address}/{link}")
        page.get_by_role("status").filter(has_text="found by").wait_for()
        offered = page.get_by_label("Passages")
        assert offered.locator("option").all_inner_texts() == ["5", "7"]
        assert offered.input_value() == chosen
        assert len(found(page, "lexical")) == int(chosen)


def test_a_link_to_searchers_that_are_not_served_shows_those_that_are(browser, server):
    for names, shown in (("gone", NAMES), ("gone,away", NAMES), ("gone,naive", ("naive",)), ("", ())):
        page = browser.new_context().new_page()
        page.goto(f"{server[1]}/#q=progress+bar&s={names}")
        page.get_by_role("status").filter(has_text="found by").wait_for()
        columns = [column.get_attribute("data-searcher") for column in page.locator(".column").all()]
        assert columns == [*shown]


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
    for key in ("no header holds –", "a secret"):
        page.get_by_role("textbox", name="This server asks").fill(key)
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


def test_keys_cross_a_column_without_passages_and_keep_their_place(browser, server):
    page = browser.new_context().new_page()
    nothing = re.compile(r"/v1/exact/search\?")
    page.route(
        nothing, lambda route: route.fulfill(json={"query": {"text": "x"}, "candidates": [], "took_ms": 1})
    )
    page.goto(f"{server[1]}/#q=progress+bar")
    page.locator("[data-searcher=naive] .hit").first.wait_for()
    page.locator('[data-place="0-1"]').focus()
    for key, place in (("l", "2-1"), ("l", "2-1"), ("h", "0-1")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.place") == place
    more = page.locator("[data-searcher=bm25] .more").last  # of a passage that is not the first
    row = int(more.evaluate("e => e.closest('[data-place]').dataset.place").partition("-")[2])
    assert row > 0
    more.click()
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.dataset.place") == f"0-{row - 1}"


def test_going_back_shows_what_was_there(page, server, browser):
    search(page, "progress bar")
    search(page, "table")
    expect = sync_api.expect  # waits: the page reads its address after the browser has gone back
    page.go_back()
    expect(page).to_have_title("progress bar · retrieval_jax")
    expect(page.get_by_label("Query")).to_have_value("progress bar")
    page.get_by_role("status").filter(has_text="found by").wait_for()
    page.go_back()
    expect(page).to_have_title("retrieval_jax: search side by side")
    expect(page.get_by_label("Query")).to_have_value("")
    expect(page.locator(".hit")).to_have_count(0)

    other = browser.new_context().new_page()
    other.goto("about:blank")
    other.goto(f"{server[1]}/#q=table")  # written by hand: the page completes it
    other.locator(".hit").first.wait_for()
    assert "hits=10" in other.url
    other.go_back()
    assert other.url == "about:blank"


def test_a_split_that_is_gone_hides_no_judged_queries(browser, server):
    page = browser.new_context().new_page()
    page.goto(f"{server[1]}/#q=table&hits=10&split=gone&n=0")
    page.locator(".hit").first.wait_for()
    assert page.get_by_role("button", name="Judged queries").is_visible()


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
