"""The page of all results, as a browser shows it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from playwright.sync_api import sync_playwright

from experiments.engine.records import find_records
from experiments.settings import flat
from scripts import make_report

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "results" / "runs"
SHOWN = ("mini-kmeans-seed1-27f2c65f", "mini-kmeans-seed2-a9b8d6ea", "mini-xavier-seed1-6060f9c1")
SHOWN += ("mini-xavier-seed2-5f16318d", "mini-lsuv-seed0-7280fafd")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of five runs, and where it is."""
    folder = tmp_path_factory.mktemp("report")
    for name in SHOWN:
        shutil.copytree(RUNS / "voc_cls" / name, folder / "runs" / name)
    path = folder / "report.html"
    path.write_text(make_report.report_of([folder / "runs"], find_records([folder / "runs"]))["report.html"])
    return path


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_sorts_and_hides(report):
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        wrong, fetched = [], []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(report.as_uri())

        table = page.locator("table").first
        head = table.get_by_role("button", name="measured")
        values = "rows => rows.map(row => row.cells[3].dataset.value).filter(Boolean).map(Number)"
        head.click()
        measured = table.locator("tbody tr").evaluate_all(values)
        assert len(measured) == 3
        assert measured == sorted(measured, reverse=True)
        assert head.locator("..").get_attribute("aria-sort") == "descending"
        head.focus()
        page.keyboard.press("Enter")
        assert table.locator("tbody tr").evaluate_all(values) == sorted(measured)

        box = page.get_by_role("checkbox", name="kmeans")
        box.uncheck()
        lines = page.locator("figure.curves g[id^=run-]")
        assert lines.evaluate_all("all => all.map(line => line.style.display)").count("none") == 2
        box.check()
        assert lines.count() == 5
        assert page.locator("figure.curves g[id^=run-] >> visible=true").count() == 5

        command = table.locator("details").first
        command.locator("summary").focus()
        page.keyboard.press("Enter")
        assert command.locator("code").is_visible()

        page.set_viewport_size({"width": 360, "height": 740})
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360  # tables scroll within the page
        colours = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colours.append(
                page.evaluate(
                    "[getComputedStyle(document.body).backgroundColor, "
                    "getComputedStyle(document.querySelector('svg text')).fill]"
                )
            )
        assert [background for background, _ in colours] == ["rgb(255, 255, 255)", "rgb(21, 23, 26)"]
        assert colours[0][1] != colours[1][1]
        assert wrong == []
        assert fetched == [report.as_uri()]
        browser.close()


def test_the_page_states_what_the_records_hold(report):
    text = report.read_text()
    assert "56.6" in text
    for name in SHOWN:
        record = json.loads((RUNS / "voc_cls" / name / "record.json").read_text())
        assert name in text
        assert f'data-value="{100 * record["metrics"]["map_step"]}"' in text
        assert record["git_commit"][:10] in text
    assert "python experiments/voc_cls.py -m preset=mini init=kmeans seed=1,2<" in text


@pytest.mark.parametrize(
    "name",
    ["voc_cls/mini-gaussian-seed0-8079c539", "voc_cls/paper-kmeans-seed0-520f5ad3", "voc_det/mini-pca-seed0-f759d103"],
)
def test_a_command_repeats_its_run(name):
    config = json.loads((RUNS / name / "record.json").read_text())["config"]
    _, script, *words = shlex.split(make_report.command(config))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        again = dict(flat(OmegaConf.to_container(compose(Path(script).stem, words), resolve=True)))
    places = {
        "data.root",
        "data.cache",
        "output",
        "device",
        "threads",
        "train.checkpoint_seconds",
        "published",
        "proposals",
    }
    stated = {key: value for key, value in flat(config) if key not in places}
    assert {key: again.get(key) for key in stated} == stated


def test_the_committed_page_is_of_the_committed_records():
    text = (ROOT / "results" / "report.html").read_text()
    names = {path.parent.name for path in find_records([RUNS]) if path.parent.parent.name in make_report.METRICS}
    assert {*re.findall(r"<tr><td>((?:mini|paper|demo|none)-[\w-]+)</td>", text)} == names, "run scripts/make_report.py"
    records = {path.parent.name: json.loads(path.read_text()) for path in RUNS.glob("*/*/record.json")}
    diverged = {name for name in names if records[name].get("diverged")}
    cells = r"<tr><td>([\w-]+)</td><td><code>[^<]*</code></td><td[^>]*>\d+</td><td>diverged</td>"
    assert {*re.findall(cells, text)} == diverged
