"""The report in headless Chromium, as a person uses it; screenshots go to the folder ABLITERATE_SCREENSHOTS."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from abliterate.report import load_run, write_html
from abliterate.report.figures import all_figures
from browser import chromium, complaints, eventually, opened, picture, prefer, printed, requests, sized

pytestmark = pytest.mark.slow

PHONE = (360, 780)


@pytest.fixture(scope="module")
def file(frontier):
    return write_html(frontier)


@pytest.fixture(scope="module")
def driver():
    with chromium() as found:
        yield found


@pytest.fixture
def page(driver, file):
    """The report, freshly opened on a wide, light screen; whatever a test does, no request and no complaint."""
    sized(driver, 1200, 900)
    prefer(driver, "light")
    requests(driver), complaints(driver)  # what other tests left
    yield opened(driver, file)
    assert requests(driver) == []
    assert complaints(driver) == []


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = os.environ.get("ABLITERATE_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


def marks(page, name: str) -> list[str]:
    """Where a scatter chart's points are drawn."""
    return page.execute_script(
        "return [...document.querySelectorAll(`.chart[data-figure='${arguments[0]}'] .scatterlayer .point`)]"
        ".map(p => p.getAttribute('transform'))",
        name,
    )


def choose(page, name: str, value: int) -> None:
    """Move a chart's control as a person would, with the events that come of it."""
    page.execute_script(
        "const c = document.querySelector(`[data-frames='${arguments[0]}']`); c.value = arguments[1];"
        "c.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        str(value),
    )


def caption(page, name: str) -> str:
    return page.execute_script("return document.getElementById('caption-' + arguments[0]).textContent", name)


def test_every_chart_draws(page, frontier):
    figures = all_figures(load_run(frontier))
    del figures["strengths"]  # the chosen point's, which are drawn with the frontier
    for name, figure in figures.items():
        drawn = page.execute_script(
            "const c = document.querySelector(`.chart[data-figure='${arguments[0]}']`);"
            "return c ? [c.querySelectorAll('.scatterlayer .point').length,"
            "c.querySelectorAll('.heatmaplayer image').length, c.clientWidth, c.querySelectorAll('svg').length] : null",
            name,
        )
        assert drawn, f"{name} isn't on the page"
        points, maps, width, svgs = drawn
        data, _ = figure.at(figure.shown)
        expected = sum(sum(y is not None for y in trace["y"]) for trace in data if trace["type"] == "scatter")
        assert points == expected, name
        assert maps == sum(trace["type"] == "heatmap" for trace in data), name
        assert width > 300
        assert svgs


def test_colours_are_the_themes(page):
    fill = "return getComputedStyle(document.querySelector(\".chart[data-figure='projection'] .point\")).fill"
    light = page.execute_script(fill)
    assert light == "rgb(194, 65, 12)"
    prefer(page, "dark")
    eventually(page, fill, "rgb(255, 138, 92)")
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
    button = page.find_element("id", "theme")
    button.click()  # light, whatever the system prefers
    eventually(page, fill, light)
    assert button.text == "Theme: light"


def test_slider_changes_the_projection(page, frontier):
    from selenium.webdriver.common.keys import Keys

    slider = page.find_element("css selector", "[data-frames='projection']")
    layer = int(slider.get_attribute("value"))
    before = marks(page, "projection")
    slider.send_keys(Keys.ARROW_LEFT if layer else Keys.ARROW_RIGHT)
    after = layer - 1 if layer else layer + 1
    assert marks(page, "projection") != before
    assert f"Layer {after}," in caption(page, "projection")
    assert slider.get_attribute("aria-valuetext").startswith(f"layer {after}")
    slider.send_keys(Keys.ARROW_RIGHT if layer else Keys.ARROW_LEFT)
    assert marks(page, "projection") == before


def test_lists_change_the_heat_maps(page, frontier):
    chart = ".chart[data-figure='${arguments[0]}']"
    image = f"return document.querySelector(`{chart} .heatmaplayer image`).getAttribute('href')"
    for name in ("cosines", "tokens"):
        before = page.execute_script(image, name), caption(page, name)
        frames = all_figures(load_run(frontier))[name].frames
        shown = int(page.execute_script("return document.querySelector(`[data-frames='${arguments[0]}']`).value", name))
        choose(page, name, (shown + 1) % len(frames))
        assert page.execute_script(image, name) != before[0]
        assert caption(page, name) == frames[(shown + 1) % len(frames)].summary


def test_a_click_on_a_point_shows_its_strengths(page, frontier):
    from selenium.webdriver import ActionChains

    frames = all_figures(load_run(frontier))["point-strengths"].frames
    assert caption(page, "point-strengths") == frames[2].summary
    before = marks(page, "point-strengths")
    points = page.find_elements(
        "css selector", ".chart[data-figure='frontier'] .scatterlayer .trace:first-child .point"
    )
    assert len(points) == 4
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", points[0])
    ActionChains(page).move_to_element(points[0]).pause(0.3).click().perform()
    assert caption(page, "point-strengths") == frames[0].summary
    assert page.find_element("css selector", "[data-frames='point-strengths']").get_attribute("value") == "0"
    assert marks(page, "point-strengths") != before
    assert "point 1: 9 of 10 not answered" in caption(page, "point-strengths")


def test_folding(page):
    details = page.find_element("id", "target-examples")
    text = details.find_element("css selector", "article h3")
    assert not text.is_displayed()
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", details)
    details.find_element("css selector", "summary").click()
    assert text.is_displayed()
    details.find_element("css selector", "summary").click()
    assert not text.is_displayed()


def test_kept_answers_are_folded_twice(driver, shown):
    page = opened(driver, write_html(shown, shown / "asked.html", show_completions=True))
    answers = page.find_elements("css selector", "#target-examples blockquote")
    assert answers
    assert not any(answer.is_displayed() for answer in answers)
    page.execute_script("document.getElementById('target-examples').open = true")
    assert not any(answer.is_displayed() for answer in answers)
    page.execute_script("document.querySelectorAll('details.answer').forEach(d => d.open = true)")
    assert all(answer.is_displayed() for answer in answers)


def test_a_phone_scrolls_only_downwards(page, file):
    sized(page, *PHONE, mobile=True)
    opened(page, file)
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    width, wide = page.execute_script(
        "return [document.documentElement.scrollWidth, [...document.querySelectorAll('main > * *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, .chart'))"
        ".map(e => e.outerHTML.slice(0, 90))]"
    )
    assert width <= PHONE[0]
    assert wide == []


def test_keyboard_and_screen_reader(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "To the results"
    unlabelled = page.execute_script(
        "const named = e => e.labels?.length || e.textContent.trim();"
        "const told = e => e.ariaLabel && document.getElementById(e.getAttribute('aria-describedby'))?.textContent;"
        "const all = (what, fine) => [...document.querySelectorAll(what)].filter(e => !fine(e));"
        "return [...all('input, select, button', named), ...all('[role=img]', told),"
        "...document.querySelectorAll('[role=img] :is(a, button, input)')].map(e => e.outerHTML.slice(0, 90))"
    )
    assert unlabelled == []
    levels = page.execute_script("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.execute_script("return document.documentElement.lang") == "en"


def test_screenshots(page, file, screenshots):
    picture(page, screenshots / "report-light.png")
    prefer(page, "dark")
    picture(page, screenshots / "report-dark.png")
    printed(page, screenshots / "report-print.pdf")
    assert page.execute_script("return document.documentElement.dataset.theme") is None  # light only on paper
    prefer(page, "light")
    sized(page, *PHONE, mobile=True)
    opened(page, file)
    picture(page, screenshots / "report-phone.png")
    assert all(shot.stat().st_size > 20_000 for shot in screenshots.glob("report-*"))


def test_no_script_leaves_the_tables(driver, file):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(file.absolute().as_uri())
        assert "need JavaScript" in driver.find_element("id", "no-charts").text
        assert driver.find_elements("css selector", "#figure-outcome table")
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
