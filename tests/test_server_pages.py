"""The pages of the server in a real browser, and its log on a terminal."""

import io
import json
import logging
import shutil

import pytest
from support.checkpoints import MINILM_NAME, write_bert_reranker
from support.serving import serving

from unpadded.server import logs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(minilm):
    with serving(minilm, "--api-key", "secret") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request, browser, server):
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(600_000)
    faults, urls = [], []
    page.on("pageerror", lambda fault: faults.append(fault))  # playwright sets attributes of the function
    page.on("request", lambda request: urls.append(request.url))
    yield page
    assert not faults and all(url.startswith((server.url, "data:")) for url in urls), urls
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def test_only_a_browser_gets_a_page_at_the_root(server):
    for accept, html in ((BROWSER, True), ("*/*", False), ("application/json, text/html;q=0.1", True), ("", False)):
        status, headers, body = server.request("GET", "/", accept=accept)
        assert status == 200 and headers["content-type"].startswith("text/html") == html == bool(body)
        assert not html or b"default-src 'none'" in body


def test_the_page_shows_the_model_and_ranks_lines(server, page):
    page.goto(server.url + "/")
    page.fill("#key", "wrong")
    page.press("#key", "Tab")
    page.locator("#facts", has_text="API key").wait_for()
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.locator("#facts", has_text="384 dimensions").wait_for()
    assert page.inner_text("h1") == MINILM_NAME and page.title() == f"{MINILM_NAME} - unpadded"
    calls = page.locator("#calls pre").all_inner_texts()
    assert len(calls) == 3 and all(server.url in call and "$KEY" in call for call in calls)
    lines = page.input_value("#lines").split("\n")
    page.fill("#lines", "\n".join([EVIL, *reversed(lines)]))
    page.click("button")
    page.wait_for_selector("#nearest li")
    rows = [row.split("\n") for row in page.locator("#nearest li").all_inner_texts()]
    assert rows[0][0] == lines[0] and {row[0] for row in rows} == {EVIL, *lines}
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True) and 0.4 < scores[0] < 1
    page.fill("#text", "")
    page.fill("#lines", "")
    page.click("button")
    page.locator("#status", has_text="length >= 1").wait_for()
    links = [link.get_attribute("href") for link in page.locator("nav a").all()]
    assert links == ["docs", "openapi.json", "metrics", "health"]


@pytest.mark.parametrize(("labels", "path"), [(("LABEL_0",), "/rerank"), (("a", "b"), "/predict")])
def test_the_page_of_a_model_with_scores_shows_how_to_get_them(browser, tmp_path, labels, path):
    with serving(write_bert_reranker(tmp_path / "model", labels=labels)) as server:
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(server.url + "/")
        page.locator("#facts", has_text="128 dimensions").wait_for()
        calls = page.locator("#calls pre").all_inner_texts()
        page.close()
        assert len(calls) == 4 and calls[0].startswith(f"curl {server.url}{path}")
        body = json.loads(calls[0].partition("-d '")[2].rstrip("'"))
        assert server.post(path, body)


def test_the_documentation_lists_every_operation_and_field(server, page):
    page.goto(server.url + "/docs")
    page.wait_for_selector("details")
    document = json.loads(server.request("GET", "/openapi.json")[2])
    expected = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    titles = page.locator("summary").all()
    shown = {(title.locator("span").inner_text(), title.locator("code").inner_text()) for title in titles}
    assert shown == expected
    page.locator("summary", has_text="/v1/embeddings").click()
    fields = page.locator("details[open] td:first-child").all_inner_texts()
    assert fields == list(document["components"]["schemas"]["EmbeddingsRequest"]["properties"])


@pytest.fixture
def levels():
    """Restore the levels of loggers by `setLevel`, which forgets what the loggers below have cached."""
    before = {logger: logger.level for logger in (logging.getLogger(), logging.getLogger("unpadded"))}
    yield
    for logger, level in before.items():
        logger.setLevel(level)


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_is_text_on_a_terminal_and_json_otherwise(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logs.configure_logging()
    logging.getLogger("unpadded.server").info("request", extra={"fields": {"id": "\x1b[31m\n\x9b", "status": 200}})
    line = stream.getvalue()
    if terminal:
        assert line[8:] == ' INFO    request id="\\u001b[31m\\n\\u009b" status=200\n'
    else:
        assert json.loads(line)["id"] == "\x1b[31m\n\x9b" and json.loads(line)["message"] == "request"
