"""The studio in headless Chromium, as a person uses it; screenshots go to the folder ABLITERATE_SCREENSHOTS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from abliterate.recipe import load_recipe
from browser import chromium, complaints, picture, prefer, requests, sized
from long import LONG

pytestmark = [pytest.mark.slow, LONG]
pytest.importorskip("gradio", reason="gradio isn't installed")


@contextmanager
def studio(folder, *arguments):
    """`abliterate studio` in a process of its own; gives its address, and ends it with Ctrl-C."""
    command = [sys.executable, "-m", "abliterate.cli", "studio", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--folder", str(folder), "--port", "0", "--no-browser"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("studio: http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert out == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()


class Page:
    """The page and what a person does with it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self):
        self.driver.get(self.address)
        self.until(lambda: self.driver.find_elements("id", "ask") and "no model" not in self.text("status").lower())

    def until(self, true, seconds=120):
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except (NoSuchElementException, StaleElementReferenceException):
                pass  # the page is being drawn
            time.sleep(0.1)
        raise AssertionError(f"it never came to that; {self.driver.find_element('tag name', 'body').text}")

    def click(self, name):
        element = self.driver.find_element("id", name)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def tab(self, name):
        self.driver.find_element("xpath", f"//button[@role='tab'][normalize-space()='{name}']").click()

    def text(self, name):
        return " ".join(self.driver.find_element("id", name).text.split())

    def field(self, name):
        return self.driver.find_element("css selector", f"#{name} textarea, #{name} input")

    def value(self, name):
        return self.field(name).get_attribute("value")

    def type(self, name, text):
        from selenium.webdriver.common.keys import Keys

        field = self.field(name)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)
        if field.get_attribute("role") in ("combobox", "listbox"):
            field.send_keys(Keys.ENTER)

    def slide(self, name, to):
        """Move a slider with the arrow keys, one step at a time."""
        from selenium.webdriver.common.keys import Keys

        handle = self.driver.find_element("css selector", f"#{name} input[type=range]")
        steps = round((to - float(handle.get_attribute("value"))) / float(handle.get_attribute("step")))
        for _ in range(abs(steps)):
            handle.send_keys(Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT)

    def answers(self, note):
        """Both answers, once the edited one is of these strengths and neither grows any more."""
        self.until(lambda: self.text("note") == f"Edited: {note}." and self.value("edited"))
        before = None
        while before != (before := (self.value("original"), self.value("edited"))):
            time.sleep(1.5)
        return before

    def tokens(self, number):
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element("css selector", "#controls button.label-wrap").click()
        field = self.until(lambda: self.driver.find_element("css selector", "#tokens input[type=number]"))
        self.until(field.is_displayed)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(number), Keys.TAB)

    def complains(self):
        """The line of the message that says what went wrong; it is closed."""
        message = self.until(lambda: self.driver.find_elements("css selector", ".toast-body.error"))[-1]
        said = self.until(lambda: message.get_attribute("textContent"))
        message.find_element("css selector", "button").click()
        self.until(lambda: not self.driver.find_elements("css selector", ".toast-body.error"))
        return said

    def clean(self):
        """Nothing was asked of another server, and the console is silent."""
        assert [url for url in requests(self.driver) if not url.startswith((self.address, "ws://127.0.0.1"))] == []
        assert complaints(self.driver) == []


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = os.environ.get("ABLITERATE_SCREENSHOTS")
    path = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads):
    with chromium(width=1280, height=900, served=True, downloads=downloads) as found:
        yield found


@pytest.fixture
def page(driver, served):
    """The studio of a tiny model, freshly opened."""
    sized(driver, 1280, 900)
    prefer(driver, "light")
    requests(driver), complaints(driver)  # what other tests left
    with studio(served, served / "model", "--recipe", served / "recipe.safetensors") as address:
        found = Page(driver, address)
        found.open()
        yield found
        driver.get("about:blank")


def test_load_slide_compare_save_and_reload_with_the_demo_model(driver, tmp_path, screenshots):
    import abliterate as ab

    h = ab.load(ab.demo_model())
    prompts = ab.load_sides("bundled", "bundled", limit_train=24, limit_validation=8, limit_test=8)
    directions = ab.difference_of_means(ab.collect(h, prompts.target.train, prompts.baseline.train))
    edit = ab.Edit.uniform(ab.find_writers(h), directions.unit[15, 0, -1])
    ab.save_recipe(ab.recipe_for(edit, h), tmp_path / "found.safetensors")
    del h
    requests(driver), complaints(driver)
    with studio(tmp_path) as address:
        page = Page(driver, address)
        driver.get(address)
        page.until(lambda: page.driver.find_elements("id", "ask"))
        page.type("model", "demo")
        page.type("recipe", "found.safetensors")
        page.click("load")
        page.until(lambda: "30 layers" in page.text("status") and "found.safetensors" in page.text("status"))
        page.tokens(24)
        page.type("prompt", "Name three rivers in Europe.")
        page.click("ask")
        original, edited = page.answers("strength 1")
        assert len(original) > 20 and len(edited) > 20
        picture(driver, screenshots / "studio-talk.png")
        page.slide("overall", 2)
        kept, strong = page.answers("strength 2")
        assert kept == original
        assert strong != edited
        page.slide("overall", 0)
        assert page.answers("strength 0") == (original, original)
        page.slide("overall", 1.5)
        page.slide("group-mlp", 0.5)
        _, scaled = page.answers("strength 1.5, mlp × 0.5")
        page.tab("Grid")
        page.type("prompts", "Name a river.\nWhat is 2 + 2?\n")
        page.click("compare")
        page.until(lambda: "judged by words" in page.text("table"))
        picture(driver, screenshots / "studio-grid.png")
        page.tab("Keep")
        page.type("name", "mine")
        page.click("save")
        page.until(lambda: "Saved mine.safetensors (strength 1.5, mlp × 0.5)" in page.text("saved"))
        driver.refresh()
        page.until(lambda: page.driver.find_elements("id", "ask"))
        page.type("model", "demo")
        page.type("recipe", "mine.safetensors")
        page.click("load")
        page.until(lambda: "mine.safetensors" in page.text("status"))
        page.tokens(24)
        page.type("prompt", "Name three rivers in Europe.")
        page.click("ask")
        assert page.answers("strength 1") == (original, scaled)
        page.clean()
        driver.get("about:blank")
    saved = load_recipe(tmp_path / "mine.safetensors").edit
    assert sorted({round(float(s), 3) for s in saved.strengths.flatten()}) == [0.75, 1.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.safetensors", "mine.safetensors"]


def test_two_tabs_do_not_mix_strengths(page):
    driver = page.driver
    first = driver.current_window_handle
    page.tokens(200)
    page.slide("overall", 0)
    page.click("ask")
    driver.switch_to.new_window("tab")
    try:
        page.open()
        page.tokens(200)
        page.slide("overall", 2)
        page.click("ask")
        strong = page.answers("strength 2")
        assert strong[0] != strong[1]
        page.clean()
        driver.close()
    finally:
        driver.switch_to.window(first)
    same = page.answers("strength 0")
    assert same[0] == same[1] == strong[0]


def test_frontier_report_and_export(page, served, downloads, screenshots):
    driver = page.driver
    page.tab("Frontier")
    page.type("out", "out")
    page.until(lambda: "divergence 0.2 nats (chosen)" in page.text("point"))
    driver.find_elements("css selector", "#point input")[1].click()
    picked = "return document.querySelector('#svg .picked title')?.textContent"
    page.until(lambda: "4 of 8" in (driver.execute_script(picked) or ""))
    page.click("take")
    page.until(lambda: "frontier/01.safetensors" in page.text("status"))
    page.click("make-report")
    page.until(lambda: driver.find_elements("id", "report") and page.text("report"))
    picture(driver, screenshots / "studio-frontier.png")
    page.click("report")
    page.until(lambda: (downloads / "report.html").is_file())
    assert (downloads / "report.html").read_text() == (served / "out" / "report.html").read_text()
    page.tab("Keep")
    page.type("form", "adapter")
    page.type("export-name", "lora")
    page.click("export")
    page.until(lambda: "Wrote lora as adapter" in page.text("exported"))
    picture(driver, screenshots / "studio-keep.png")
    assert (served / "lora" / "adapter_model.safetensors").is_file()
    page.clean()


def test_a_run_is_started_watched_and_stopped(page, served, screenshots):
    driver = page.driver
    before = {path.name for path in served.iterdir()}
    page.tab("Run")
    page.type("method", "sweep")
    page.click("start")
    page.until(lambda: "Starting" in page.text("progress") or " of " in page.text("progress"))
    page.until(lambda: driver.find_elements("css selector", "#progress progress"), 300)
    picture(driver, screenshots / "studio-run.png")
    page.click("halt")
    page.until(lambda: "studio-run was stopped" in page.text("progress"), 300)
    assert {path.name for path in served.iterdir()} == before
    page.clean()


def test_what_goes_wrong_is_one_line(page, served, tmp_path):
    driver = page.driver
    page.type("model", "../elsewhere")
    page.click("load")
    assert "outside the studio's folder" in page.complains()
    page.type("model", "model")
    page.tab("Keep")
    page.type("name", str(tmp_path / "x.safetensors"))
    page.click("save")
    said = page.complains()
    assert "outside" in said and "Traceback" not in said and 'File "' not in said
    page.type("name", "recipe.safetensors")
    page.click("save")
    assert "exists; take another name" in page.complains()
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"\0" * 64)
    upload = "#controls input[type=file]"
    driver.find_element("css selector", upload).send_keys(str(wrong))
    assert "not a whole safetensors file" in page.complains()
    right = tmp_path / "right.safetensors"
    right.write_bytes((served / "recipe.safetensors").read_bytes())
    driver.find_element("css selector", upload).send_keys(str(right))
    page.until(lambda: "recipe right.safetensors (uploaded)" in page.text("status"))
    assert not (tmp_path / "x.safetensors").exists()
    assert "layers" in page.text("status")


def test_on_a_phone_and_in_the_dark(page, screenshots):
    driver = page.driver
    page.click("ask")
    page.answers("strength 1")
    sized(driver, 390, 800, mobile=True)
    wide = "return document.documentElement.scrollWidth"
    assert page.until(lambda: driver.execute_script(wide) <= 390)
    picture(driver, screenshots / "studio-phone.png")
    sized(driver, 1280, 900)
    prefer(driver, "dark")
    page.open()
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.until(lambda: int(driver.execute_script(colour).strip("rgb()").split(",")[0]) < 60)
    picture(driver, screenshots / "studio-dark.png")
    page.clean()


def test_a_password_is_asked_for_on_the_page(driver, served):
    requests(driver), complaints(driver)
    with studio(served, served / "model", "--password", "let me in") as address:
        driver.get(address)
        page = Page(driver, address)
        page.until(lambda: driver.find_elements("css selector", "input[type=password]"))
        assert not driver.find_elements("id", "ask")
        fields = driver.find_elements("css selector", "input")
        fields[0].send_keys("me")
        fields[1].send_keys("let me in")
        driver.find_element("xpath", "//button[normalize-space()='Login']").click()
        page.until(lambda: driver.find_elements("id", "ask"))
        assert [url for url in requests(driver) if not url.startswith((address, "ws://127.0.0.1"))] == []
        driver.get("about:blank")
