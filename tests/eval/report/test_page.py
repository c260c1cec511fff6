"""The report page: one file that needs nothing, whole in a real browser, unharmed by whatever models wrote."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadInputError
from common.figures import MARKERS, marker_polygon, method_looks
from eval.report.page import make_page
from eval.report.page_data import page_data
from eval.report.page_html import tables
from eval.report.report import make_report
from eval.results.reader import PAPER, load
from eval.results.result import Score
from eval.results.rows import assemble
from eval.results.samples import answers_of, sample_files
from eval.stats.gains import Measure
from tests.helpers.browser import CHROMIUM, DRIVER, MISSING, Browser, browser
from tests.helpers.forked import run_script
from tests.helpers.made_results import (
    HOSTILE,
    SIZES,
    column_outcomes,
    made,
    samples,
    sweep,
    verdicts,
    write,
    write_family,
)

ROOT = Path(__file__).resolve().parents[3]
NAMES = "base=Base,code=Code </script>,maths=Math"


def silent(sentence: str) -> None:
    """Hear no remarks."""


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / "scripts" / "report.py", *arguments)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a family with AIM at four omegas, hostile generations and labels, as the script writes it."""
    folder = tmp_path_factory.mktemp("page")
    write_family(folder / "results", sweep())
    done = script(folder / "results", "--out", folder / "page.html", "--names", NAMES, "--title", "<Merges & more>")
    assert done.returncode == 0, done.stderr
    assert "needs nothing else" in done.stderr
    return folder / "page.html"


def chunk(text: str, name: str) -> Any:
    found = re.search(rf'id="chunk-{name}">([^<]*)<', text)
    assert found, name
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_page_is_one_file(page: Path) -> None:
    """No address but SVG's namespace, no file beside it, and a policy that allows its own style and script alone."""
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link|img|iframe|object|embed)\b|\bsrc=|@import|url\(", text)
    assert [p.name for p in page.parent.iterdir() if p.is_file()] == ["page.html"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'")
    for tag in ("style", "script"):
        own = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(own) == 1
        digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_page_holds_the_tables(page: Path) -> None:
    """Every cell of the tables is in the page as text, without JavaScript: numbers, changes, populations, marks."""
    text = page.read_text(encoding="utf-8")
    models = load([page.parent / "results"], {"base": "Base", "code": "Code </script>", "maths": "Math"}, silent)
    report = make_report(models, Measure(), silent)
    words = html.unescape(re.sub(r"<[^>]*>", " ", text.split("<main>")[1].split('id="fronts"')[0]))
    for line in report.lines:
        assert line.label in words
        for cell in line.cells:
            assert cell.number in words
            assert cell.change is None or cell.change in words
    assert "GSM8K +8.75" in words
    assert words.count("Code </script>, Math") == 5


def test_gain_is_in_the_summaries(page: Path) -> None:
    """The page's first sentence and the badge of each comparison hold the significance of HV gain, as the tables do."""
    text = page.read_text(encoding="utf-8")
    models = assemble(sweep(), {}, silent)
    report = make_report(models, Measure(), silent)
    beyond = {key for key, column in report.uncertainty.significant if column == "HV Gain"}
    assert 0 < len(beyond) < 4
    first = re.search(r"<header>.*?<p>(.*?)</p>", text, re.DOTALL)
    assert first
    assert (
        f"HV Gain is significantly higher for {len(beyond)}, significantly lower for 0 and not significantly"
        in first[1]
    )
    badges = re.findall(r'<span class="badge[^"]*">(.*?)</summary>', text)
    assert len(badges) == 4
    rows = models.families[0].relaxed
    assert [">HV Gain +" in badge for badge in badges] == [row.key in beyond for row in rows]
    assert all("up" in badge for badge in badges if "HV Gain +" in badge)


def test_gains_and_losses_differ_in_color() -> None:
    """A change has the class of a gain or a loss by the direction of its metric, not by its sign."""
    results = []
    for r in (made("base"), made("code"), made("maths"), made("ties"), made("ties_aim")):
        error = Score("error", 10.0 - len(results), higher_is_better=False)
        results.append(replace(r, scores={"error": error, "GSM8K": r.scores["GSM8K"]}, outcomes={}))
    text = tables(make_report(assemble(results, {}, silent), Measure(), silent))
    changes = re.findall(r'<span class="change( up| down)?(?: sure)?">([+-])', text)
    assert changes == [(" up", "+"), (" up", "-")]
    css = (ROOT / "eval" / "report" / "page" / "page.css").read_text()
    assert ".up { color: var(--good); }" in css
    assert ".down { color: var(--bad); }" in css


def test_markers_are_those_of_the_figures() -> None:
    """Each method's marker on the page is a polygon of the figures' marker; corners lie in the unit circle."""
    core = page_data(load([PAPER], {}, silent), make_report(load([PAPER], {}, silent), Measure(), silent), {}).core
    looks = method_looks(core["methods"])
    assert core["methods"]["Task Arithmetic"] is None
    for method, corners in core["methods"].items():
        expected = marker_polygon(looks[method][0])
        assert (corners is None) == (expected is None)
        for x, y in corners or ():
            assert x * x + y * y <= 1.2
    assert len({json.dumps(corners) for corners in core["methods"].values()}) == len(core["methods"])
    assert [v["label"] for v in core["variants"]] == ["with AIM"]
    assert all(len(marker_polygon(marker) or [1] * 3) >= 3 for marker in MARKERS)


def test_answers_are_packed_as_they_were(page: Path) -> None:
    """Prompts, references, generations, choices and extracted answers come back out of the page letter by letter."""
    text = page.read_text(encoding="utf-8")
    core = json.loads(re.search(r'id="core">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    names = [model["name"] for model in core["models"]]
    number = names.index("ties_aim_0.4")
    result = next(r for r in sweep() if r.model == "out/ties_aim_0.4")
    for column, asked in samples(result).items():
        questions, answers = chunk(text, f"q-{column}"), chunk(text, f"a{number}-{column}")
        assert len(questions) == len(asked) == SIZES[column]
        for i, sample in enumerate(asked):
            assert questions[i][0] == sample["arguments"][0][0].encode("utf-8", "replace").decode()
            own = answers["answers"][i]
            if column == "MMLU":
                assert questions[i][1] == "ABCD"[int(sample["target"])]
                assert [c[0] for c in own["c"]] == list("ABCD")
            else:
                assert own["t"] == [sample["resps"][0][0].encode("utf-8", "replace").decode()]
            if column == "GSM8K":
                right = result.outcomes[column].tasks["gsm8k_paper"].verdicts["acc"][i]
                assert (own["x"] == sample["target"]) == bool(right)
    bench = next(b for b in core["benchmarks"] if b["column"] == "GSM8K")
    expected = result.outcomes["GSM8K"].tasks["gsm8k_paper"].verdicts["acc"]
    assert bench["verdicts"][str(number)] == "".join(str(int(v)) for v in expected)


def test_same_results_same_page(page: Path, tmp_path: Path) -> None:
    """The page depends on the results alone: made again, it is the same bytes; with --max_items it shows fewer."""
    again = script(
        page.parent / "results", "--out", tmp_path / "p.html", "--names", NAMES, "--title", "<Merges & more>"
    )
    assert again.returncode == 0
    assert (tmp_path / "p.html").read_bytes() == page.read_bytes()
    assert script(page.parent / "results", "--out", tmp_path / "q.html", "--max_items", 5, "--quiet").returncode == 0
    assert len(chunk((tmp_path / "q.html").read_text(), "q-GSM8K")) == 5
    refused = script(page.parent / "results", "--out", tmp_path / "r.html", "--max_items", 0)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "r.html").exists()


def test_samples_of_other_data_or_cut_short(tmp_path: Path) -> None:
    """A line that is cut short is named with its file; samples of another version of an item are not shown."""
    result = made("ties")
    asked = samples(result)
    asked["GSM8K"][0] = {**asked["GSM8K"][0], "doc_hash": "f" * 64}
    file = write(result, tmp_path, samples=asked)
    files = sample_files([tmp_path])
    assert sample_files([file]) == files
    found = answers_of(result, files["out/ties"], silent)
    assert ("gsm8k_paper", 0) not in found["GSM8K"]
    assert len(found["GSM8K"]) == SIZES["GSM8K"] - 1
    cut = next(path for path in files["out/ties"] if "gsm8k" in path.name)
    cut.write_text(cut.read_text()[:-30])
    with pytest.raises(BadInputError, match=rf"{cut.name}, line {SIZES['GSM8K']} is not valid JSON"):
        answers_of(result, files["out/ties"], silent)
    remarks: list[str] = []
    answers_of(result, [], remarks.append)
    assert any("no samples of HumanEval" in warn for warn in remarks)


def test_published_results_have_a_page_too() -> None:
    """Scores without outcomes give tables and fronts, and a page without items."""
    models = load([PAPER], {}, silent)
    text = make_page(models, make_report(models, Measure(), silent), {}, "The paper")
    assert 'id="chunk-' not in text
    core = json.loads(re.search(r'id="core">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert len(core["pairs"]) == 15
    assert len(core["models"]) == 44
    assert "no AIM row with outcomes" in text


needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)


@pytest.fixture(scope="module")
def window(page: Path) -> Iterator[Browser]:
    """A browser that has opened the page once."""
    with browser() as opened:
        opened.window(1280, 900, dark=False)
        opened.open(page)
        opened.wait("document.querySelectorAll('.item').length > 3 && document.querySelector('#detail pre')")
        yield opened


def choose(window: Browser, name: str, value: str, event: str = "change") -> None:
    window.run(
        f"const e = document.getElementById({name!r}); e.value = {value!r}; e.dispatchEvent(new Event({event!r}))"
    )


def count(window: Browser, left: str) -> None:
    window.wait(f"document.getElementById('count').textContent.startsWith({left!r})")


@needs_browser
def test_browser_opens_it_without_network_or_error(window: Browser) -> None:
    """Nothing is said on the console, nothing but the file is asked for, and nothing a model wrote has run."""
    assert window.logs("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in window.logs("performance")]
    sent = [m["params"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    addresses = [p["request"]["url"] for p in sent if p["documentURL"].startswith("file:")]  # others are the new tab's
    assert len(addresses) == 1
    assert addresses[0].endswith("/page.html")
    assert window.run("return window.broken") is None
    assert window.run("return document.querySelectorAll('main, section').length") == 7
    assert window.run("return document.title") == "<Merges & more>"


@needs_browser
def test_browser_shows_hostile_answers_as_text(window: Browser) -> None:
    """Each hostile generation is on the screen letter by letter, inside its own box, and does nothing."""
    choose(window, "benchmark", "GSM8K")
    count(window, "400 of")
    for item in (i for i in range(3, 40, 7)):
        window.run(f"document.getElementById('list').scrollTop = {item * 64}")
        window.wait(f"document.getElementById('item-{item}')")
        window.run(f"document.getElementById('item-{item}').click()")
        window.wait(f"document.querySelector('#detail h3').textContent === 'gsm8k_paper #{item}'")
        expected = HOSTILE[item % len(HOSTILE)].encode("utf-8", "replace").decode()
        shown = window.run("return [...document.querySelectorAll('#detail .answers pre')].map(e => e.textContent)")
        assert len(shown) == 2
        assert all(expected in text for text in shown)
    assert window.run("return document.querySelectorAll('#detail img, #detail script').length") == 0
    assert window.run("return window.broken") is None
    assert window.logs("browser") == []


@needs_browser
def test_browser_draws_only_rows_in_view(window: Browser) -> None:
    """Of 400 items a few rows are in the document, wherever the list is scrolled to; the keyboard goes through all."""
    choose(window, "benchmark", "GSM8K")
    count(window, "400 of")
    window.run("document.getElementById('list').scrollTop = 1e9")
    window.wait("document.getElementById('item-399')")
    assert window.run("return document.querySelectorAll('.item').length") < 40
    press = "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: %r, cancelable: true}))"
    window.run(press % "Home")
    window.run(press % "ArrowDown")
    window.run(press % "PageDown")
    window.wait("document.querySelector('[aria-selected=true]')?.id === 'item-9'")
    assert window.run("return document.getElementById('list').getAttribute('aria-activedescendant')") == "item-9"
    assert window.run("return document.getElementById('item-9').getAttribute('aria-setsize')") == "400"


@needs_browser
def test_browser_filters_and_searches(window: Browser) -> None:
    """Verdict filters leave the items they say, a search finds prompts and answers and marks them; both go together."""
    choose(window, "benchmark", "GSM8K")
    count(window, "400 of")
    results = {r.model: r for r in sweep()}
    a, b = (
        results[f"out/{name}"].outcomes["GSM8K"].tasks["gsm8k_paper"].verdicts["acc"]
        for name in ("ties", "ties_aim_0.8")
    )
    choose(window, "want-a", "0")
    choose(window, "want-b", "1")
    count(window, f"{sum(x < y for x, y in zip(a, b, strict=True))} of")
    choose(window, "want-a", "")
    choose(window, "want-b", "")
    choose(window, "search", "Ann has 17 apples", "input")
    count(window, "1 of")
    window.wait("document.querySelector('#detail mark')")
    assert window.run("return document.querySelector('#detail mark').textContent") == "Ann has 17 apples"
    choose(window, "search", "onmouseover=", "input")
    count(window, f"{len([i for i in range(400) if i % 7 == 3 and i % 5 == 3])} of")
    choose(window, "search", "no such words", "input")
    count(window, "0 of")
    choose(window, "search", "", "input")
    count(window, "400 of")


@needs_browser
def test_browser_shows_every_kind_of_answer(window: Browser) -> None:
    """Multiple choice has its choices with the chosen one, IFEval its four verdicts; any model can be put beside."""
    choose(window, "benchmark", "MMLU")
    count(window, "300 of")
    window.wait("document.querySelectorAll('#detail .choice').length === 2")
    choose(window, "benchmark", "IFEval")
    count(window, "120 of")
    window.wait("document.querySelector('#detail').textContent.includes('inst_level_strict_acc')")
    window.run("document.querySelector('.chips button').click()")
    window.wait("[...document.querySelectorAll('#detail h3')].some(e => e.textContent.startsWith('B: Base'))")


@needs_browser
def test_browser_plots(window: Browser) -> None:
    """Each pair of benchmarks has a small plot; the chosen one has every model with its scores in words; omega curves
    have five points each."""
    assert window.run("return document.querySelectorAll('#pairs button').length") == 6
    window.run("document.querySelectorAll('#pairs button')[4].click()")
    assert (
        window.run("return document.getElementById('front-x').value + document.getElementById('front-y').value")
        == "MMLUIFEval"
    )
    points = window.run("return [...document.querySelectorAll('#front a')].map(e => e.getAttribute('aria-label'))")
    assert len(points) == 8
    assert any(
        re.fullmatch(r"Ties Merging, .*, AIM at omega 0.4: MMLU 52.33, IFEval \d+.\d\d", text) for text in points
    )
    choose(window, "front-x", "IFEval")
    assert window.run("return document.getElementById('front-y').value") == "MMLU"
    assert window.run("return document.querySelectorAll('#front > svg path.front').length") == 5
    assert window.run("return [...document.querySelectorAll('.curves')].map(e => e.querySelectorAll('a').length)") == [
        25
    ]


@needs_browser
def test_browser_tables_sort_and_show_intervals(window: Browser) -> None:
    """A heading sorts its table, again the other way; intervals appear when asked for."""
    cells = (
        "[...document.querySelectorAll('#tables table')[1].tBodies[0].rows].map(r => Number(r.children[4].dataset.v))"
    )
    click = "[...document.querySelectorAll('#tables table')[1].querySelectorAll('.sort')][2].click()"
    window.run(click)
    down = window.run(f"return {cells}")
    assert down == sorted(down, reverse=True)
    window.run(click)
    assert window.run(f"return {cells}") == down[::-1]
    shown = "return document.querySelector('.ci').offsetHeight > 0"
    assert not window.run(shown)
    window.run("document.getElementById('intervals').click()")
    assert window.run(shown)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_browser_at_any_width_in_any_light(window: Browser, page: Path, width: int, dark: bool) -> None:
    """Nothing is wider than the window; text keeps a contrast of 4.5 to its ground in light and dark; the button turns
    one into the other."""
    window.window(width, 844, dark, phone=width < 500)
    window.open(page)
    window.wait("document.querySelectorAll('.item').length > 3")
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")
    contrast = """
      const part = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
      const level = c => {
        const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(x => part(x / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = e => {
        while (e.parentElement && getComputedStyle(e).backgroundColor.match(/, 0\\)$/)) e = e.parentElement;
        return getComputedStyle(e).backgroundColor;
      };
      const names = 'h1;header p;td;thead th;.change;.change.sure;.badge.sure;.sub;label;pre;nav a;.v1;.v0';
      return names.split(';').map(name => {
        const e = document.querySelector(name), a = level(getComputedStyle(e).color), b = level(ground(e));
        return [name, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
      });"""
    assert [found for found in window.run(contrast) if found[1] < 4.5] == []
    body = "return getComputedStyle(document.body).backgroundColor"
    before = window.run(body)
    window.run("document.getElementById('theme').click()")
    assert window.run(body) != before
    window.run("localStorage.clear()")
    assert len(window.screenshot()) > 10_000


@needs_browser
def test_browser_takes_the_size_of_mmlu(window: Browser, tmp_path: Path) -> None:
    """Fourteen thousand items of two models: a page of a few MB that opens and searches, with few rows drawn."""
    sizes = 14042
    results = []
    for name, skill in (("ties", 0.5), ("ties_aim", 0.52)):
        right = (verdicts("MMLU", skill, name) * (sizes // 300 + 1))[:sizes]
        outcomes, score = column_outcomes("MMLU", right)
        results.append(replace(made(name), scores={"MMLU": score}, outcomes={"MMLU": outcomes}))
    models = assemble(results, {}, silent)
    for result in results:
        write(result, tmp_path, samples=samples(result))
    files = sample_files([tmp_path])
    answers = {r.model: answers_of(r, files[r.model], silent) for r in results}
    text = make_page(models, make_report(models, Measure(), silent), answers, "MMLU").encode()
    assert len(text) < 3_000_000
    (tmp_path / "mmlu.html").write_bytes(text)
    window.open(tmp_path / "mmlu.html")
    count(window, f"{sizes} of")
    choose(window, "search", "number 6999?", "input")
    count(window, "2 of")
    choose(window, "search", "", "input")
    count(window, f"{sizes} of")
    window.run("document.getElementById('list').scrollTop = 1e9")
    window.wait(f"document.getElementById('item-{sizes - 1}')")
    assert window.run("return document.querySelectorAll('.item').length") < 40
    assert window.logs("browser") == []
