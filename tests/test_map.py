"""The map of a Parquet output: what is read, where points lie, and the page in a real browser."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.browser import CHROMIUM, Page, open_browser

import unpadded
from unpadded.cli.main import main
from unpadded.cli.map_page.colors import color_points
from unpadded.cli.map_page.projection import project
from unpadded.cli.map_page.sample import read_sample

EVIL = '</script><script>document.title = "owned"</script><img src=x onerror=alert(1)> {{script}} <!-- & "quoted"'
TEXTS = [
    EVIL,
    "the tide rises",
    "the Tide falls, and the tide rises again",
    "bread is baked",
    "日本語 テキスト",
    "x" * 1000,
]
TOPICS = [EVIL, "sea", "sea", "food", None, "sea"]


class Scripts(HTMLParser):
    """The contents of the script elements, as a browser cuts them, and the names of all elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.elements: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1] == "script" and data.strip():
            self.scripts.append(data)


def flat(vectors: np.ndarray) -> np.ndarray:
    """Stands for UMAP where places do not matter."""
    return vectors[:, :2]


def vectors_column(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of six texts in two parts, beside names that are none of its parts."""
    monkeypatch.setattr("unpadded.cli.map_page.project", flat)
    monkeypatch.chdir(tmp_path)
    places = np.array([[0, 0, 1], [4, 0, 1], [4, 4, 1], [0, 4, 1], [2, 2, 1], [2, 0, 1]], np.float32)
    table = pa.table({"id": [f"d{i}" for i in range(6)], "embedding": vectors_column(places), "tokens": [3] * 6})
    table = table.append_column("text", [TEXTS]).append_column("topic", [TOPICS])
    table = table.append_column("year", [[str(1990 + i) for i in range(6)]])
    Path("vectors").mkdir()
    pq.write_table(table[:4], "vectors/part-000000.parquet")
    pq.write_table(table[4:], "vectors/part-000001.parquet")
    Path("vectors/_manifest.json").write_text("{}")
    return tmp_path


def data_of(path: Path) -> Any:
    found = Scripts(path.read_text(encoding="utf-8"))
    assert found.elements.count("script") == 2 and "img" not in found.elements
    return json.loads(found.scripts[0])


def test_a_page_holds_the_points_and_loads_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "vectors/", "--color-column", "topic"]) == 0
    assert "6 of 6 vectors -> vectors.html" in capsys.readouterr().err
    data = data_of(Path("vectors.html"))
    order = [int(name[1:]) for name in data["ids"]]
    assert sorted(order) == list(range(6))
    assert data["texts"] == [TEXTS[i] if len(TEXTS[i]) < 400 else "x" * 400 + "…" for i in order]
    assert data["color"]["labels"] == ["sea", EVIL, "food", "(none)"] and data["color"]["counts"] == [3, 1, 1, 1]
    page = Path("vectors.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "6 texts, 3 dimensions" in page
    assert main(["map", "vectors", "--color-column", "topic", "-o", "again.html"]) == 0
    assert Path("again.html").read_text() == page


def test_a_sample_is_drawn_and_said(folder: Path) -> None:
    assert main(["map", "vectors/", "--sample", "4", "--text-column", "id"]) == 0
    data = data_of(Path("vectors.html"))
    assert len(set(data["ids"])) == 4 and data["texts"] == data["ids"] and data["color"] is None
    assert "4 of 6 texts" in Path("vectors.html").read_text()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "uint8", "binary", "ubinary"])
def test_vectors_of_every_precision_keep_their_directions(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What `unpadded embed` wrote, with the text carried along: near texts stay near by cosine."""
    monkeypatch.chdir(tmp_path)
    engine = unpadded.load(minilm, device="cpu")
    monkeypatch.setattr(unpadded, "load", lambda model, **options: engine)
    texts = ["A cat sleeps.", "A kitten naps.", "Stocks fell on Monday.", "The market lost value."]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save("ranges.npy", np.stack([np.full(384, -0.2, np.float32), np.full(384, 0.2, np.float32)]))
    flags = ["--precision", precision, "--ranges", "ranges.npy", "--carry", "text"]
    assert main(["embed", "in.jsonl", "-m", "loaded", "-o", "out.parquet", *flags]) == 0
    points = read_sample("out.parquet", vector_column="embedding", text_column=None, color_column=None, sample=9)
    assert points.dimensions == 384 and points.texts is not None
    unit = points.vectors / np.linalg.norm(points.vectors, axis=1, keepdims=True)
    assert (points.vectors.dtype, unit.shape) == (np.float32, (4, 384))
    exact = np.array(engine.encode(points.texts))
    if "binary" in precision:
        exact = np.where(exact > 0, 1, -1) / np.sqrt(384)
    np.testing.assert_allclose(unit @ unit.T, exact @ exact.T, atol=0.01)


def test_near_vectors_lie_near_and_equal_ones_give_equal_places() -> None:
    draw = np.random.default_rng(0)
    topics = np.repeat(np.arange(4), 25)
    vectors = np.eye(4, 32)[topics] + draw.normal(0, 0.1, (100, 32))
    places = project(vectors.astype(np.float32))
    apart = np.linalg.norm(places[:, None] - places, axis=2) + np.diag(np.full(100, np.inf))
    assert (topics[apart.argmin(axis=1)] == topics).all()
    np.testing.assert_array_equal(project(vectors.astype(np.float32)), places)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_vectors_have_places(count: int) -> None:
    places = project(np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32))
    assert places.shape == (count, 2) and np.isfinite(places).all()


def test_colors_follow_the_values() -> None:
    numbers = color_points(pa.array([*map(str, range(20)), None]), "n")
    assert (numbers.counts, numbers.labels, numbers.rest) == (None, ["0", "19"], 1)
    assert numbers.codes.tolist()[:2] == [0, 3] and numbers.codes.tolist()[-2:] == [63, 64]
    days = color_points(pa.array([datetime.date(2000, 1, 1 + i) for i in range(20)]), "day")
    assert days.labels == ["2000-01-01", "2000-01-20"] and days.codes[0] == 0 and days.codes[-1] == 63
    few = color_points(pa.array([3, 3, 1]), "label")
    assert (few.labels, few.counts, few.codes.tolist()) == (["3", "1"], [2, 1], [0, 0, 1])
    many = color_points(pa.array([f"v{i // 2}" for i in range(40)] + ["v7", None]), "v")
    assert (many.labels[0], many.labels[-2:], many.rest) == ("v7", ["9 others", "(none)"], 2)
    assert many.counts == [3, *[2] * 10, 18, 1] and many.codes[-1] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.parquet"], "do not exist: 'absent.parquet'"),
        (["notes.txt"], "not Parquet: 'notes.txt'"),
        (["empty"], "the folder has no .parquet: 'empty'"),
        (["none.parquet"], "'none.parquet' has 0 rows"),
        (["ragged.parquet"], "not of one length: 'ragged.parquet'"),
        (["nan.parquet"], "a vector is not finite: 1 of 'nan.parquet'"),
        (["vectors", "--vector-column", "tokens"], "not a column of vectors: 'tokens' of 'vectors' is int64"),
        (["vectors", "--color-column", "kind"], "no column 'kind': 'vectors' has 'id', 'embedding'"),
        (["vectors", "--sample", "0"], "--sample is not positive: 0"),
        (["vectors", "-o", "map.png"], "the map is a page: 'map.png'"),
        (["vectors", "-o", "absent/map.html"], "cannot be written: 'absent/map.html'"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("notes")
    rows = pa.array([[1.0, 2.0], [3.0]])
    pq.write_table(pa.table({"embedding": rows}), "ragged.parquet")
    pq.write_table(pa.table({"embedding": rows[:0]}), "none.parquet")
    pq.write_table(pa.table({"embedding": pa.array([[1.0], [float("nan")]])}), "nan.parquet")
    before = sorted(folder.rglob("*"))
    assert main(["map", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1, stderr
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module", params=[[], ["--disable-3d-apis"]], ids=["webgl", "canvas"])
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with open_browser(tmp_path_factory.mktemp("profile"), *request.param) as page:
        yield page
        assert page.errors == []


def pixel(page: Page, name: str) -> list[int]:
    """Red, green, blue at the place of a point, as it is drawn."""
    return page.run(f"""(() => {{
        draw.frame(devicePixelRatio);
        const [x, y] = place(data.ids.indexOf({name!r})).map((at) => Math.round(at * devicePixelRatio));
        const found = new Uint8Array(4);
        if (gl) gl.readPixels(x, canvas.height - 1 - y, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, found);
        else found.set(canvas.getContext("2d").getImageData(x, y, 1, 1).data);
        return [...found];
    }})()""")


def test_the_page_in_a_browser(browser: Page, folder: Path, request: pytest.FixtureRequest) -> None:
    assert main(["map", "vectors/", "--color-column", "topic"]) == 0
    browser.open(Path("vectors.html"))
    assert browser.run("document.title") == "vectors"
    assert browser.run("gl !== null") == ("webgl" in request.node.name)

    def hover(name: str) -> str:
        x, y = browser.run(f"place(data.ids.indexOf({name!r}))")
        browser.mouse("mouseMoved", x + 3, y)
        return browser.run("at('tip').hidden ? '' : at('tip').innerText")

    for name, text, topic in zip(["d0", "d1", "d4"], [EVIL, TEXTS[1], TEXTS[4]], [EVIL, "sea", "(none)"], strict=True):
        shown = hover(name)
        assert text in shown and topic in shown and name in shown
    browser.mouse("mouseMoved", 1190, 10)
    assert browser.run("at('tip').hidden")

    sea, food = pixel(browser, "d1"), pixel(browser, "d3")
    assert sea[3] > 150 and sea[2] > sea[0] and food[1] > food[0] and pixel(browser, "d2") == sea  # blue, green

    browser.run("at('search').focus()")
    browser.type("tide")
    assert browser.run("at('found').textContent") == "2 of 6"
    assert pixel(browser, "d3")[3] < 60 < 200 < pixel(browser, "d1")[3]
    assert "tide rises again" in hover("d2") and browser.run("document.querySelectorAll('mark').length") == 2
    assert hover("d3") == ""
    browser.run("at('search').value = '日本'; at('search').oninput({target: at('search')})")
    assert browser.run("at('found').textContent") == "1 of 6"
    browser.run("at('search').value = ''; at('search').oninput({target: at('search')})")

    assert "sea\n3" in browser.run("at('legend').innerText") and "(none)\n1" in browser.run("at('legend').innerText")
    browser.run("document.querySelector('#legend button').click()")
    assert browser.run("at('found').textContent") == "3 of 6"
    browser.run("document.querySelector('#legend button').click()")

    x, y = browser.run("place(data.ids.indexOf('d1'))")
    before = browser.run("view.scale")
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    assert browser.run("view.scale") > 1.3 * before
    assert browser.run("place(data.ids.indexOf('d1'))") == pytest.approx([x, y], abs=1)
    browser.mouse("mousePressed", 900, 600, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", 930, 560, button="left", buttons=1)
    browser.mouse("mouseReleased", 930, 560, button="left", clickCount=1)
    assert browser.run("place(data.ids.indexOf('d1'))") == pytest.approx([x + 30, y - 40], abs=1)
    browser.run("document.querySelector('#zoom [data-key=\"0\"]').click()")
    assert browser.run("view.scale") == pytest.approx(before)


def test_numbers_have_a_ramp_and_follow_the_system_scheme(browser: Page, folder: Path) -> None:
    table = pa.table({"embedding": vectors_column(np.random.default_rng(0).random((40, 2), np.float32))})
    pq.write_table(table.append_column("n", [[*range(39), None]]), "numbers.parquet")
    assert main(["map", "numbers.parquet", "--color-column", "n"]) == 0
    for scheme, ground in (("light", "rgb(251, 251, 250)"), ("dark", "rgb(20, 22, 26)")):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(Path("numbers.html"))
        assert browser.run("getComputedStyle(document.body).backgroundColor") == ground
        assert browser.run("at('legend').innerText").split() == ["n", "0", "38"]
        assert pixel(browser, "0")[2] > pixel(browser, "0")[0] and pixel(browser, "38")[0] > pixel(browser, "38")[2]
