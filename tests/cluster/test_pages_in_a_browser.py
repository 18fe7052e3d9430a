"""An evaluation's page as its readers use it, in headless Chromium."""

import re
import shutil

import pytest

from cluster.figures import TrainingCoverage, row_figures, summarise
from cluster.report import write_evaluation_report
from phantoms import rows
from tests.cluster.test_figures import record
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """500 rows, each with a Dice of its own; every tenth malformed."""
    folder = tmp_path_factory.mktemp("run")
    write_rows(folder / "rows.parquet", rows(500, seed=8, modalities=["CT", "X-ray"]))
    samples = list(Dataset.open(folder / "rows.parquet"))
    greedy, figures = {}, {}
    for i, sample in enumerate(samples):
        failure = "no answer block" if i % 10 == 0 else None
        figures_of = {} if failure else {"dice": (i * 37 % 500) / 500, "iou": (i * 91 % 500) / 500}
        greedy[sample.id] = {
            **record(sample, failure=failure, **figures_of),
            "query": sample.query,
            "category": sample.category,
            "modality": sample.modality,
            "points": None if failure else sample.points,
            "reasoning": "The <b>liver</b> lies there.",
            "completion": "",
            "reward": 1.0,
            "parts": {"mask_dice": 0.5},
        }
        figures[sample.id] = row_figures([greedy[sample.id]], sample)
    failures = {row: found["failure"] for row, found in greedy.items() if found["failure"]}
    metrics = summarise(figures, {sample.id: TrainingCoverage([]).strata(sample) for sample in samples}, failures)
    page = folder / "report" / "index.html"
    by_id = {sample.id: sample for sample in samples}
    return write_evaluation_report(page, "run", {"settings": {"model": "tiny"}, **metrics}, greedy, by_id, limit=500)


@pytest.fixture(scope="module")
def page(report):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1400})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.goto(report.as_uri())
        yield page
        assert not faults
        browser.close()


def values(page, key):
    return [float(v) for v in page.eval_on_selector_all("#gallery > article", f"all => all.map(a => a.dataset.{key})")]


def test_it_is_light_and_asks_nobody(report):
    assert report.stat().st_size < 30e6
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", report.read_text())


def test_the_worst_come_first_and_the_order_can_be_changed(page):
    assert len(values(page, "dice")) == 500 and values(page, "dice") == sorted(values(page, "dice"))
    page.select_option("#order", "-iou")
    assert values(page, "iou") == sorted(values(page, "iou"), reverse=True)
    page.select_option("#order", "dice")


def test_filters_narrow_the_gallery_and_say_so(page):
    page.fill("#low", "0.4")
    page.fill("#high", "0.6")
    found = values(page, "dice")
    assert 0 < len(found) < 150 and all(0.4 <= value <= 0.6 for value in found)
    assert page.text_content("#shown").startswith(f"{len(found)} of 500 shown")
    page.fill("#low", "0")
    page.fill("#high", "1")
    page.select_option("#failure", "no answer block")
    assert values(page, "dice") == [0.0] * 50
    page.select_option("#failure", "")
    page.select_option("#category", "liver")
    categories = page.eval_on_selector_all("#gallery > article", "all => all.map(a => a.dataset.category)")
    assert categories and set(categories) == {"liver"}
    page.select_option("#category", "")


def test_what_is_drawn_can_be_switched(page):
    box = page.locator("#gallery > article:nth-child(60) .prediction .box")
    box.scroll_into_view_if_needed()
    assert box.is_visible()
    page.uncheck("#show-box")
    assert not box.is_visible()
    page.check("#show-box")
    page.uncheck("#show-prediction")
    assert not box.is_visible()
    page.check("#show-prediction")


def test_text_of_a_model_is_text(page):
    assert page.locator(".reasoning b").count() == 0
    assert "<b>liver</b>" in page.locator(".reasoning").first.text_content()
