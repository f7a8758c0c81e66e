"""The map of a Parquet output: what is read, where points are placed, and the page in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import unpadded
from unpadded.cli.main import main
from unpadded.cli.topic_map import find_clusters, project, read_points, topic_words
from unpadded.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--enable-unsafe-swiftshader")
EVIL = '</script><script>document.title = "owned"</script><img src=x onerror=alert(1)> <!-- & "quoted"'
SUBJECTS = ("tide ocean moon", "bread flour oven", "engine piston fuel")
PER_SUBJECT = 35


def vectors_column(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def three_subjects(per_subject: int = PER_SUBJECT) -> pa.Table:
    """Texts about three subjects, with vectors in three directions."""
    subject = np.repeat(np.arange(3), per_subject)
    vectors = np.eye(3, 16)[subject] + np.random.default_rng(0).normal(0, 0.05, (len(subject), 16))
    texts = [f"text {i} of the {SUBJECTS[s]}" for i, s in enumerate(subject)]
    texts[0] = EVIL
    columns = {"embedding": vectors_column(vectors.astype(np.float32)), "text": texts}
    return pa.table(columns | {"topic": [EVIL if s == 0 else SUBJECTS[s] for s in subject], "year": 1900 + subject})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in two parts, `vectors/`."""
    monkeypatch.chdir(tmp_path)
    table = three_subjects()
    Path("vectors").mkdir()
    pq.write_table(table[:50], "vectors/part-000000.parquet")
    pq.write_table(table[50:], "vectors/part-000001.parquet")
    Path("vectors/_manifest.json").write_text("{}")
    return tmp_path


def test_a_sample_is_random_and_the_same_at_each_call(folder: Path) -> None:
    points = read_points("vectors", "embedding", "text", "year", 10)
    again = read_points("vectors", "embedding", "text", "year", 10)
    assert points.total_rows == 105 and len(set(points.texts)) == 10 and (points.texts == again.texts).all()
    every = read_points("vectors", "embedding", "text", None, 1000)
    assert (points.texts != every.texts[:10]).any() and set(points.texts) <= set(every.texts)
    rows = [list(every.texts).index(text) for text in points.texts]
    np.testing.assert_array_equal(points.vectors, every.vectors[rows])


def test_a_damaged_page_is_an_error(folder: Path) -> None:
    path = Path("vectors/part-000000.parquet")
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[pq.read_metadata(path).row_group(0).column(0).data_page_offset + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="the vectors cannot be read: 'vectors'"):
        read_points("vectors", "embedding", "text", None, 1000)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "uint8", "binary", "ubinary"])
def test_vectors_of_every_precision_keep_their_directions(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = unpadded.load(minilm, device="cpu")
    monkeypatch.setattr(unpadded, "load", lambda model, **options: engine)
    texts = ["A cat sleeps.", "A kitten naps.", "Stocks fell on Monday.", "The market lost value."]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save("ranges.npy", np.stack([np.full(384, -0.2, np.float32), np.full(384, 0.2, np.float32)]))
    flags = ["--precision", precision, "--ranges", "ranges.npy", "--carry", "text"]
    assert main(["embed", "in.jsonl", "-m", "loaded", "-o", "out.parquet", *flags]) == 0
    points = read_points("out.parquet", "embedding", "text", None, 9)
    unit = points.vectors / np.linalg.norm(points.vectors, axis=1, keepdims=True)
    assert (list(points.texts), points.vectors.dtype, unit.shape) == (texts, np.float32, (4, 384))
    exact = np.array(engine.encode(texts))
    if "binary" in precision:
        exact = np.where(exact > 0, 1, -1) / np.sqrt(384)
    np.testing.assert_allclose(unit @ unit.T, exact @ exact.T, atol=0.01)


def test_similar_vectors_are_placed_together_and_form_clusters_named_by_their_words() -> None:
    table = three_subjects()
    vectors = np.stack(table["embedding"].to_numpy())
    positions = project(vectors)
    np.testing.assert_array_equal(project(vectors), positions)
    clusters = find_clusters(positions)
    subject = np.repeat(np.arange(3), PER_SUBJECT)
    assert {frozenset(subject[clusters == c]) for c in range(clusters.max() + 1)} == {
        frozenset({0}),
        frozenset({1}),
        frozenset({2}),
    }
    for cluster, name in enumerate(topic_words(np.array(table["text"].to_pylist(), object), clusters)):
        words = SUBJECTS[subject[clusters == cluster][0]].split()
        assert len(name.split(", ")) == 2 and set(name.split(", ")) <= set(words), name


def test_clusters_of_many_points_are_those_of_a_sample_and_numbered_by_size() -> None:
    sizes = np.arange(600, 1000, 10)
    draw = np.random.default_rng(0)
    positions = np.concatenate([draw.normal((10 * i, 0), 0.1, (n, 2)) for i, n in enumerate(sizes)])
    clusters = find_clusters(positions[draw.permutation(len(positions))])
    found = np.bincount(clusters[clusters >= 0])
    assert len(found) == 40 and found.sum() > 0.9 * sizes.sum() and found[0] > found[20] > found[-1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_vectors_have_positions_and_no_clusters(count: int) -> None:
    positions = project(np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32))
    assert positions.shape == (count, 2) and np.isfinite(positions).all()
    assert (find_clusters(positions) == -1).all()


def test_texts_without_words_have_a_name() -> None:
    assert topic_words(np.array(["1", "2", "3"], object), np.array([0, 0, 1])) == ["cluster 1", "cluster 2"]
    assert topic_words(np.array(["a", "word"], object), np.array([0, 1])) == ["cluster 1", "word"]
    assert topic_words(np.array(["word"], object), np.array([-1])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.parquet"], "do not exist: 'absent.parquet'"),
        (["notes.txt"], "cannot be read: 'notes.txt'"),
        (["empty"], "no .parquet: 'empty'"),
        (["none.parquet"], "'none.parquet' has 0 rows"),
        (["ragged.parquet"], "'ragged.parquet' differ in length: [1, 2]"),
        (["nan.parquet"], "1 vectors of 'nan.parquet' are not finite"),
        (["vectors", "--vector-column", "year"], "not a column of vectors: 'year' of 'vectors' is int64"),
        (["vectors", "--color-column", "kind"], "no column 'kind' in 'vectors', which has 'embedding'"),
        (["bare.parquet"], "no column 'text' in 'bare.parquet', which has 'embedding'; embed with --carry text"),
        (["vectors", "--sample", "0"], "--sample is not positive: 0"),
        (["vectors", "-o", "map.png"], "'map.png'; use a name that ends in .html"),
        (["vectors", "-o", "absent/map.html"], "cannot be written: 'absent/map.html'"),
    ],
)
def test_errors_name_the_value_and_leave_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty").mkdir()
    Path("notes.txt").write_text("notes")
    rows, texts = pa.array([[1.0], [2.0, 3.0]]), ["a", "b"]
    pq.write_table(pa.table({"embedding": rows, "text": texts}), "ragged.parquet")
    pq.write_table(pa.table({"embedding": rows[:0], "text": texts[:0]}), "none.parquet")
    pq.write_table(pa.table({"embedding": pa.array([[1.0], [float("nan")]]), "text": texts}), "nan.parquet")
    pq.write_table(pa.table({"embedding": rows}), "bare.parquet")
    before = sorted(folder.rglob("*"))
    assert main(["map", *arguments]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr, stderr
    assert sorted(folder.rglob("*")) == before


class Browser:
    """One page of a headless Chromium, which collects script errors and requests for anything but local files."""

    def __init__(self, page) -> None:
        self.page = page
        self.unexpected: list[str] = []
        page.set_default_timeout(600_000)  # a hang; on a busy machine, everything takes many times as long
        page.on("pageerror", lambda error: self.unexpected.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.unexpected.append(message.text))
        page.on("request", lambda request: request.url.startswith("file:") or self.unexpected.append(request.url))

    def open(self, path: str) -> None:
        self.page.goto(Path(path).resolve().as_uri())
        self.page.wait_for_selector(".annotation-text")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()


@pytest.fixture
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = Browser(chromium.new_page(viewport={"width": 1200, "height": 800}))
        yield found
        chromium.close()
    assert found.unexpected == []


def test_the_page_names_clusters_shows_texts_and_filters(browser: Browser, folder: Path) -> None:
    assert main(["map", "vectors/", "--title", "<b>Corpus</b>"]) == 0
    browser.open("vectors.html")
    page = browser.page
    assert page.title() == "<b>Corpus</b>" and browser.texts(".gtitle") == ["<b>Corpus</b>"]
    labels = browser.texts(".annotation-text")
    assert len(labels) == 3 and {word for name in labels for word in name.split(", ")} <= set(
        " ".join(SUBJECTS).split()
    )
    assert sorted(browser.texts(".legendtext")) == sorted(f"{name} (35)" for name in labels)

    texts = page.evaluate("document.querySelector('.js-plotly-plot').data.flatMap(trace => trace.hovertext)")
    assert len(texts) == 105 and sum("&lt;/script&gt;" in text for text in texts) == 1
    x, y = page.evaluate("""(() => {
        const {_fullLayout: {xaxis, yaxis}, _fullData: [{x, y}]} = document.querySelector('.js-plotly-plot');
        return [xaxis._offset + xaxis.d2p(x[7]), yaxis._offset + yaxis.d2p(y[7])];
    })()""")
    page.mouse.move(x, y)
    page.wait_for_selector(".hovertext")
    assert any(word in browser.texts(".hovertext")[0] for word in labels[0].split(", "))

    page.locator(".legendtoggle").first.click()
    page.wait_for_function("document.querySelector('.js-plotly-plot').data[0].visible === 'legendonly'")
    assert page.title() == "<b>Corpus</b>", "a text of the corpus ran as a script"


@pytest.mark.parametrize(("scheme", "color"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)")])
def test_the_page_follows_the_color_scheme_and_fits_a_phone(
    browser: Browser, folder: Path, scheme: str, color: str
) -> None:
    assert main(["map", "vectors/", "--color-column", "topic"]) == 0
    browser.page.emulate_media(color_scheme=scheme)
    browser.page.set_viewport_size({"width": 390, "height": 844})
    browser.open("vectors.html")
    assert browser.page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    assert sorted(browser.texts(".legendtext")) == sorted(f"{name} (35)" for name in (EVIL, *SUBJECTS[1:]))
    assert browser.page.evaluate("document.documentElement.scrollWidth") == 390


def test_numbers_and_dates_have_a_color_scale(browser: Browser, folder: Path) -> None:
    table = three_subjects()
    for column, values, expected in [
        ("n", pa.array(range(105)), "100"),
        ("day", pa.array(np.arange(105) * 10, pa.int32()).cast(pa.date32()), "1970-01-01"),
    ]:
        pq.write_table(table.append_column(column, [values]), "scaled.parquet")
        assert main(["map", "scaled.parquet", "--color-column", column]) == 0
        browser.open("scaled.html")
        assert expected in browser.texts(".colorbar .cbaxis text") and browser.texts(".legendtext") == []
        assert browser.texts(".cbtitle") == [column]


@pytest.mark.slow
def test_a_hundred_thousand_points(browser: Browser, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UMAP alone takes minutes for so many; the rest is real."""
    monkeypatch.setattr("unpadded.cli.topic_map.project", lambda vectors: vectors[:, :2])
    pq.write_table(three_subjects(per_subject=40_000), "many.parquet")
    assert main(["map", "many.parquet"]) == 0
    browser.open("many.html")
    drawn = "document.querySelector('.js-plotly-plot').data.map(trace => trace.hovertext.length)"
    assert sum(browser.page.evaluate(drawn)) == 100_000
    assert len(browser.texts(".annotation-text")) >= 3
