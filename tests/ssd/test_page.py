"""The page of a run and of several: its data, and what a reader does with it in a browser."""

import base64
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_resume import write_features
from summaries import summary_of

from ssd import compare, train
from ssd.config import EVERYDAY, PRESETS, Config, resolve
from ssd.errors import UserError
from ssd.metrics import USED
from ssd.page import EDGES, LEVELS, REPORT, VALUES, command_of, encode, thinned, write_page
from ssd.storage.run_folder import FREQUENCY, METRICS, SUMMARY

HOSTILE = "</script><script>window.hit = 1</script><!--<b title='\"&amp;"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def finished(
    folder: Path, tasks: int = 3, neurons: int = 40, epochs: int = 4, **changes: Any
) -> Path:
    """Writes the files of a finished run that a page shows; it evaluates every second epoch."""
    random = np.random.default_rng(tasks)
    matrix = np.tril(random.random((tasks, tasks)))
    records: list[dict[str, Any]] = []
    for task, row in enumerate(matrix):
        for epoch in range(epochs):
            records.append({"task": task, "epoch": epoch})
            if epoch % 2:
                records[-1]["test_accuracy"] = (row * (epoch + 1) / epochs).tolist()
    frequency = random.random((tasks, neurons)) ** 4
    frequency[:, ::5] = 0  # dead
    frequency[1, 1::5] = USED / 2
    folder.mkdir()
    summary = summary_of(matrix.tolist(), neurons=neurons, epochs=epochs) | changes
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(folder / FREQUENCY, frequency)
    return folder


def written(*folders: Path) -> str:
    out = folders[0].parent / "page.html"
    write_page({folder.name: folder for folder in folders}, out)
    return out.read_text(encoding="utf-8")


class Scripts(HTMLParser):
    """The texts of a page's scripts, as a browser separates them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts.append(data)


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Scripts(text).texts[0])


def test_data(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a run")
    [run] = data_of(written(folder))["runs"]
    summary = json.loads((folder / SUMMARY).read_text())
    assert run["name"] == "a run"
    assert run["config"] == summary["config"]
    assert run["versions"] == summary["versions"]
    assert run["measures"]["bwt"] == summary["bwt"]
    np.testing.assert_allclose(run["matrix"], summary["accuracy_matrix"], atol=5e-5)
    assert run["times"] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert [len(row) for row in run["curves"]] == [1, 1, 2, 2, 3, 3]
    np.testing.assert_allclose(run["curves"][5], summary["accuracy_matrix"][2], atol=5e-5)
    codes = np.frombuffer(base64.b64decode(run["frequency"]), np.uint8).reshape(3, 40)
    np.testing.assert_array_equal(codes, encode(np.load(folder / FREQUENCY)))


def test_same_run_same_bytes(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    assert written(folder) == written(folder)


def test_needs_no_network(tmp_path: Path) -> None:
    text = written(finished(tmp_path / "run"))
    assert re.findall(r"https?://[^\"' ]*", text) == ["http://www.w3.org/2000/svg"]  # a name
    assert not re.findall(r"\b(?:src|href|srcset)\s*=|@import|\burl\(|\bfetch\(|\bimport\(", text)
    assert "default-src 'none'" in text  # what the browser refuses to load


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", method=HOSTILE, versions={HOSTILE: HOSTILE})
    write_page({HOSTILE: folder}, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    [run] = data_of(text)["runs"]
    assert (run["name"], run["method"]) == (HOSTILE, HOSTILE)
    assert len(Scripts(text).texts) == 2
    assert "<title>ssd: &lt;/script&gt;" in text


def test_frequencies_as_bytes() -> None:
    frequency = np.concatenate([np.geomspace(EDGES[0], 1, 9999), np.linspace(EDGES[0], 1, 9999)])
    shown = LEVELS[encode(frequency)]
    np.testing.assert_allclose(shown, frequency, rtol=0.02)
    assert LEVELS[encode(np.array([0.0, 1.0]))].tolist() == [0, 1]
    assert encode(np.array([1e-12])) == 1
    below, at = encode(np.array([np.nextafter(USED, 0), USED]))
    assert LEVELS[below] < USED <= LEVELS[at]


def test_long_runs_show_every_nth_evaluation() -> None:
    measured = [{"task": task, "epoch": epoch} for task in range(50) for epoch in range(400)]
    kept = thinned(measured)
    assert VALUES / 2 < sum(record["task"] + 1 for record in kept) < 1.1 * VALUES
    assert [r["task"] for r in kept if r["epoch"] == 399] == list(range(50))
    assert thinned(measured[:400]) == measured[:400]


def test_size_of_a_large_run(tmp_path: Path) -> None:
    text = written(finished(tmp_path / "run", tasks=50, neurons=10_000, epochs=200))
    assert len(text.encode()) < 1e6


COMMANDS = {
    **{preset: resolve({"preset": preset}, 60_000) for preset in PRESETS},
    "defaults": Config(),
    "changed": resolve({"lr": 0.1, "k": 3, "order_seed": 4, "center": "never"}, 60_000),
    "features": resolve({"features": "my file.npz", "tasks": 50, "epochs": 7}, 500),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_the_settings_of_the_run(name: str) -> None:
    python, _, module, *words = shlex.split(command_of(COMMANDS[name]))
    assert (python, module) == ("python", "ssd.train")
    given = vars(train.build_parser().parse_args(words))
    for samples in (500, 60_000):
        assert resolve(given, samples) == COMMANDS[name]
    if name in PRESETS:  # any other command would be right too, but longer
        assert given.get("preset", EVERYDAY) == name


def test_command_for_a_data_set_of_the_users() -> None:
    assert "--dataset blobs" in command_of(replace(Config(), dataset="blobs"))


def test_training_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw", lambda folder: None)  # the figures take longer
    write_features(Path("f.npz"), 96)
    small = ["--features", "f.npz", "--tasks", "2", "--neurons", "24", "-k", "2", "--epochs", "1"]
    small += ["--device", "cpu", "--anneal-samples", "40", "--quiet"]
    assert train.main([*small, "--out", "one"]) == 0
    assert train.main([*small, "--seeds", "2", "--out", "two"]) == 0
    pages = sorted(str(path) for path in Path().rglob(REPORT))
    assert pages == ["one/report.html", "two/seed0/report.html", "two/seed1/report.html"]
    [run] = data_of(Path("two/seed1", REPORT).read_text())["runs"]
    assert run["command"].startswith("python -m ssd.train --dataset features --features f.npz ")
    assert " --seed 1 " in run["command"]
    before = Path("one", REPORT).read_bytes()
    assert train.main([*small, "--out", "one", "--resume"]) == 0
    assert Path("one", REPORT).read_bytes() == before
    assert compare.main(["two/seed0", "two/seed1"]) == 0
    assert len(data_of(Path("compare.html").read_text())["runs"]) == 2


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory with two runs of different numbers of tasks, and an unfinished one."""
    monkeypatch.chdir(tmp_path)
    finished(Path("a"), device=HOSTILE)
    finished(Path("b"), tasks=12, neurons=30)
    Path("unfinished").mkdir()
    Path("unfinished", METRICS).write_text("")
    Path("seeds").mkdir()
    Path("seeds", SUMMARY).write_text("{}")


@pytest.mark.usefixtures("two")
def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["a", "b", "--out", "new/c.html"]) == 0
    assert capsys.readouterr() == ("2 runs -> new/c.html\n", "")
    runs = data_of(Path("new/c.html").read_text())["runs"]
    assert [(run["name"], len(run["matrix"])) for run in runs] == [("a", 3), ("b", 12)]
    assert sorted(path.name for path in Path("new").iterdir()) == ["c.html"]


REFUSED = {
    "a a/../a": "a/../a is the same run as a; name each run once",
    "a absent": "absent is not a folder; name the folder of a run",
    "a unfinished": "unfinished holds no finished run; train it to its end",
    "seeds": "seeds holds no finished run; ",
    "a b --out a": "--out a is a folder; name a file",
    "": "the following arguments are required: RUN (see --help)",
}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("given", REFUSED)
def test_compare_refuses(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert compare.main(given.split()) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert said.startswith(f"error: {REFUSED[given]}")
    assert sorted(Path().rglob("*")) == before


def test_damaged_runs_are_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (folder / FREQUENCY).write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        written(folder)
    assert not (tmp_path / "page.html").exists()


# From here on a browser drives the page.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as driver:
        own = driver.chromium.executable_path
        places = [own if Path(own).is_file() else None, *map(shutil.which, BROWSERS)]
        path = next(filter(None, places), None)
        if path is None:
            pytest.skip("no Chromium is installed")
        launched = driver.chromium.launch(executable_path=path)
        yield launched
        launched.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page of runs; fails if its script did or if it asked for another file."""
    said: list[str] = []
    asked: list[str] = []
    pages = []

    def open_it(*folders: Path, width: int = 1200, scheme: str = "light") -> Any:
        written(*folders)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("svg polyline")
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert said == []
    assert asked == [(tmp_path / "page.html").as_uri()] * len(pages)


def frequencies(folder: Path) -> np.ndarray:
    """Of a run, as its page shows them."""
    return LEVELS[encode(np.load(folder / FREQUENCY))]


def chosen(page: Any) -> int:
    """The neuron that the explorer says it has chosen."""
    return int(page.inner_text("tr[aria-current] th").removeprefix("neuron "))


def test_hostile_texts_in_the_browser(open_page: Open, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", method=HOSTILE, versions={HOSTILE: HOSTILE})
    page = open_page(folder)
    assert page.evaluate("window.hit") is None
    assert page.locator("b[title]").count() == 0
    assert page.get_by_text(f"{HOSTILE} on mnist").count() == 1
    assert page.inner_text("pre") == command_of(Config(tasks=3, neurons=40, epochs=4))


def test_curves(open_page: Open, tmp_path: Path) -> None:
    """Hover, keyboard and a click on a task."""
    folder = finished(tmp_path / "run")
    page = open_page(folder)
    matrix = json.loads((folder / SUMMARY).read_text())["accuracy_matrix"]
    values = page.locator(".chips b")
    assert values.all_inner_texts() == [f"{accuracy:.3f}" for accuracy in matrix[2]]
    box = page.locator(".chart")
    area = box.bounding_box()
    page.mouse.move(area["x"] + 34 + (area["width"] - 46) * 2.02 / 3, area["y"] + 100)
    assert page.get_by_text("after 2 of 3 tasks").count() == 1
    assert values.all_inner_texts() == [f"{a:.3f}" for a in matrix[1][:2]] + ["–"]
    box.focus()
    page.keyboard.press("ArrowLeft")
    assert box.get_attribute("aria-valuenow") == "1.5"
    expected = ", ".join(f"task {t} {round(matrix[1][t] / 2, 4):g}" for t in range(2))
    assert box.get_attribute("aria-valuetext") == f"after 1.5 of 3 tasks: {expected}"
    for key, time in (("Home", "0.5"), ("ArrowLeft", "0.5"), ("End", "3"), ("ArrowRight", "3")):
        page.keyboard.press(key)
        assert box.get_attribute("aria-valuenow") == time
    page.click("button:has-text('task 1')")
    assert page.locator("[aria-pressed=true]").inner_text().startswith("task 1")
    opacity = "nodes => nodes.map(node => node.getAttribute('opacity'))"
    assert page.eval_on_selector_all("polyline", opacity) == ["0.15", "1", "0.15"]
    page.keyboard.press("Enter")  # the button has the focus
    assert page.eval_on_selector_all("polyline", opacity) == ["1", "1", "1"]


def test_matrix(open_page: Open, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    page = open_page(folder)
    matrix = json.loads((folder / SUMMARY).read_text())["accuracy_matrix"]
    cells = page.locator("[aria-label='accuracy on each task after each task'] td")
    assert cells.all_inner_texts() == [f"{a:.3f}" for row in matrix for a in row]
    assert cells.nth(1).get_attribute("class") == "faint"  # task 1 has not begun


def test_neurons(open_page: Open, tmp_path: Path) -> None:
    """Sort, filter, hover and keyboard find the neurons and numbers that numpy finds."""
    folder = finished(tmp_path / "run")
    page, shown = open_page(folder), frequencies(folder)
    sort, only = page.get_by_label("sort by"), page.get_by_label("show")
    busiest = np.where(shown.max(0) > 0, shown.argmax(0), 3)
    order = sorted(range(40), key=lambda n: (busiest[n], -shown[:, n].max(), n))
    heads = page.locator("[aria-label='activation frequencies'] tbody th")
    assert heads.all_inner_texts() == [f"neuron {n}" for n in order[:10]]

    sort.select_option("frequency in task 2")
    order = sorted(range(40), key=lambda n: (-shown[2, n], n))
    assert heads.all_inner_texts() == [f"neuron {n}" for n in order[:10]]

    only.select_option("active in task 1")
    order = [n for n in order if shown[1, n] >= USED]
    assert f"1 of {len(order)} shown" in page.inner_text("section:has(.map)")
    assert 0 < len(order) < 32

    bar = page.locator(".map")
    bar.focus()
    for key, place in (("ArrowRight", 1), ("PageDown", 11), ("ArrowLeft", 10), ("End", -1)):
        page.keyboard.press(key)
        assert chosen(page) == order[place]
    cells = page.locator("tr[aria-current] td")
    values = [float(text) for text in cells.all_inner_texts()]
    np.testing.assert_allclose(values, np.load(folder / FREQUENCY)[:, order[-1]], rtol=0.08)
    said = f"neuron {order[-1]}: {len(order)} of {len(order)} shown, most frequent in task "
    assert bar.get_attribute("aria-valuetext").startswith(said)
    assert bar.get_attribute("aria-valuenow") == str(len(order))

    area = bar.bounding_box()
    page.mouse.move(area["x"] + area["width"] * 4.5 / len(order), area["y"] + 5)
    assert chosen(page) == order[4]

    only.select_option("never active")
    sort.select_option("number")
    assert heads.all_inner_texts() == [f"neuron {n}" for n in range(0, 40, 5)]
    assert "never active" in bar.get_attribute("aria-valuetext")


def test_nothing_to_show(open_page: Open, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    np.save(folder / FREQUENCY, np.full((3, 40), 0.5))
    page = open_page(folder)
    page.get_by_label("show").select_option("never active")
    assert page.get_by_text("no neuron is like that").count() == 1
    page.locator(".map").focus()
    page.keyboard.press("End")
    assert page.get_by_text("no neuron is like that").count() == 1


def test_picture_of_the_neurons(open_page: Open, tmp_path: Path) -> None:
    """A column of the picture has the largest frequency of its neurons."""
    folder = finished(tmp_path / "run", neurons=10_000)
    frequency = np.zeros((3, 10_000))
    frequency[1, 6_000] = 0.9
    np.save(folder / FREQUENCY, frequency)
    page = open_page(folder)
    page.get_by_label("sort by").select_option("number")
    width, found = page.evaluate(
        """() => { const canvas = document.querySelector('canvas');
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, 3);
        const found = [];
        for (let i = 3; i < data.length; i += 4) if (data[i]) found.push((i - 3) / 4);
        return [canvas.width, found]; }"""
    )
    assert width < 10_000
    assert found == [width + int(0.6 * width + 1e-9)]


def test_tab_reaches_everything(open_page: Open, tmp_path: Path) -> None:
    page = open_page(finished(tmp_path / "run"))
    reached, focused = [], "document.activeElement.tagName + document.activeElement.className"
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
    assert reached == [
        *("DIVchart", "BUTTON", "BUTTON", "BUTTON", "DIVscroll"),
        *("SELECT", "SELECT", "DIVmap", "DIVscroll", "PRE", "BODY"),
    ]


CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = rgb(color).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return rgb(color)[3] ? color : node.parentElement ? behind(node.parentElement) : 'white';
  };
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  const found = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement, style = getComputedStyle(node);
    const pair = [light(node.closest('svg') ? style.fill : style.color), light(behind(node))];
    const [low, high] = pair.sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), text.data]);
  }
  return found; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_readable(open_page: Open, tmp_path: Path, width: int, scheme: str) -> None:
    """No sideways scroll of the page, and the contrast of all text that WCAG AA asks for."""
    long = "a_rather_long_name_of_a_run_" * 3
    folders = finished(tmp_path / long, method="ssd+ewc"), finished(tmp_path / "b", tasks=12)
    page = open_page(*folders, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 300
    assert [found for found in contrasts if found[0] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_change_of_the_scheme(open_page: Open, tmp_path: Path) -> None:
    page = open_page(finished(tmp_path / "run"))
    colors = "nodes => nodes.map(node => node.getAttribute('stroke'))"
    before = page.eval_on_selector_all("polyline", colors)
    page.emulate_media(color_scheme="dark")
    # The browser tells the page of the change after the call has returned.
    now = f"before => String(({colors})([...document.querySelectorAll('polyline')])) != before"
    page.wait_for_function(now, arg=",".join(before))
    assert page.eval_on_selector_all("polyline", colors) != before


def test_comparison(open_page: Open, tmp_path: Path) -> None:
    """Runs of different numbers of tasks, side by side where there is room."""
    folders = [finished(tmp_path / "a"), finished(tmp_path / "b", tasks=12, neurons=30)]
    page = open_page(*folders)
    table = page.locator("[aria-label='settings that differ'] tbody th")
    assert table.all_inner_texts() == ["tasks", "neurons"]
    rows = page.locator("[aria-label=results] tbody th").all_inner_texts()
    assert rows == ["a", "b"]
    first, second = (page.locator(f"article[aria-label={name}]").bounding_box() for name in "ab")
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    matrix = [json.loads((f / SUMMARY).read_text())["accuracy_matrix"] for f in folders]
    box = page.locator(".chart").first
    ends = [
        f"{name} {np.mean(np.round(m[-1], 4)):.3f}" for name, m in zip("ab", matrix, strict=True)
    ]
    chips = page.locator("[aria-label=comparison] button").all_inner_texts()
    assert [" ".join(chip.split()) for chip in chips] == ends
    dots = "nodes => nodes.slice(-2).map(node => +node.getAttribute('cx'))"
    short, full = page.eval_on_selector_all("article[aria-label=comparison] circle", dots)
    assert (short - 34) / (full - 34) == pytest.approx(3 / 12)  # a line has its dot where it ends
    box.focus()
    page.keyboard.press("Home")
    assert box.get_attribute("aria-valuetext").startswith("after 0.5 of 12 tasks: a 0.")
