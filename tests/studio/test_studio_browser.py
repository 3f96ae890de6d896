"""The studio in headless Chromium, as a person uses it; screenshots go to the folder ABLITERATE_SCREENSHOTS.

Every step waits for what the page then says, however long that takes on a busy machine: the note under the answers
ends with a full stop once they are whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from abliterate.edit.recipe import load_recipe
from browser import chromium, complaints, picture, prefer, requests, sized

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio isn't installed")
PATIENCE = 900  # seconds until a state that doesn't come is a failure
WIDE, PHONE = (1280, 900), (390, 800)


@contextmanager
def studio(folder, *arguments):
    """`abliterate studio` in a process of its own; gives its address, and ends it with Ctrl-C."""
    command = [sys.executable, "-m", "abliterate.cli", "studio", *map(str, arguments)]
    ours = ("ABLITERATE_", "GRADIO_")  # what a developer has set, but for the cache with the demo model
    environment = {n: v for n, v in os.environ.items() if not n.startswith(ours) or n == "ABLITERATE_CACHE"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--folder", str(folder), "--port", "0", "--no-browser"], stdout=subprocess.PIPE, stderr=errors,
            text=True, cwd=folder, env=environment,
        )  # fmt: skip

        def said():
            errors.seek(0)
            return errors.read()

        try:
            line = process.stdout.readline()
            assert line.startswith("studio: http://127.0.0.1:"), line + said()
            yield line.split()[1]
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said()
            assert "Traceback" not in said()
            assert out == ""
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


class Page:
    """The page and what a person does with it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self):
        """Open the page, and wait until its lists are filled and the model that it starts with is told."""
        self.driver.get(self.address)
        self.until(lambda: self.value("recipe") and (self.value("model") or "No model" in self.text("status")))

    def until(self, true):
        """What `true` gives, as soon as it gives something."""
        from selenium.common.exceptions import (
            ElementClickInterceptedException,
            ElementNotInteractableException,
            NoSuchElementException,
            StaleElementReferenceException,
        )

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except (
                NoSuchElementException, StaleElementReferenceException, ElementNotInteractableException,
                ElementClickInterceptedException,
            ):  # fmt: skip
                pass  # the page is being drawn
            time.sleep(0.1)
        raise AssertionError(f"it never came to that; {self.driver.find_element('tag name', 'body').text}")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def press(self, find):
        """Click once on what `find` finds, when it can be clicked on."""

        def pressed():
            element = find()
            self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
            element.click()
            return True

        self.until(pressed)

    def click(self, name):
        self.press(lambda: self.driver.find_element("id", name))

    def tab(self, name):
        path = f"//button[@role='tab'][normalize-space()='{name}']"
        self.press(lambda: self.driver.find_element("xpath", path))
        self.until(lambda: self.driver.find_element("xpath", path).get_attribute("aria-selected") == "true")

    def text(self, name):
        return " ".join(self.driver.find_element("id", name).text.split())

    def field(self, name):
        return self.driver.find_element("css selector", f"#{name} textarea, #{name} input")

    def value(self, name):
        return self.field(name).get_attribute("value")

    def type(self, name, text):
        from selenium.webdriver.common.keys import Keys

        def typed():
            field = self.field(name)
            self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", field)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text or Keys.DELETE)
            if field.get_attribute("role") in ("combobox", "listbox"):
                field.send_keys(Keys.ENTER)
            return self.value(name) == text

        self.until(typed)

    def slide(self, name, to):
        """Move a slider by its keys: to an end, or by some steps; a longer way is typed into the field beside it."""
        from selenium.webdriver.common.keys import Keys

        def slid():
            handle = self.driver.find_element("css selector", f"#{name} input[type=range]")
            now, least, most, step = (float(handle.get_attribute(name)) for name in ("value", "min", "max", "step"))
            steps = round((to - now) / step)
            if steps and to in (least, most):
                handle.send_keys(Keys.HOME if to == least else Keys.END)
            elif abs(steps) > 10:
                field = self.driver.find_element("css selector", f"#{name} input[type=number]")
                field.send_keys(Keys.CONTROL, "a")
                field.send_keys(str(to), Keys.TAB)
            elif steps:
                handle.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))
            return not steps

        self.until(slid)

    def answers(self, note):
        """Both answers, once they are whole and the edited one is of these strengths."""
        self.until(lambda: self.text("note") == f"Edited: {note}.")
        return self.value("original"), self.value("edited")

    def tokens(self, number):
        from selenium.webdriver.common.keys import Keys

        def field():
            return self.driver.find_element("css selector", "#tokens input[type=number]")

        self.press(lambda: self.driver.find_element("css selector", "#controls button.label-wrap"))

        def typed():
            field().send_keys(Keys.CONTROL, "a")
            field().send_keys(str(number), Keys.TAB)
            return field().get_attribute("value") == str(number)

        self.until(typed)

    def complains(self):
        """The line of the message that says what went wrong, which stands until it is closed."""
        shown = "document.querySelector('.toast-body.error')"
        said = self.until(lambda: self.run(f"return {shown}?.textContent"))
        self.until(lambda: self.run(f"{shown}?.querySelector('button')?.click(); return {shown} === null"))
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
    with chromium(width=WIDE[0], height=WIDE[1], served=True, downloads=downloads) as found:
        yield found


@pytest.fixture(scope="module")
def shared(template, tmp_path_factory):
    """The folder and the address of a studio with a tiny model, which several tests use as several people would."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("shared") / "folder")
    with studio(folder, folder / "model", "--recipe", folder / "recipe.safetensors") as address:
        yield folder, address


@pytest.fixture
def page(driver, shared):
    """That studio, freshly opened: whoever opens the page begins with the recipe as it is."""
    sized(driver, *WIDE)
    prefer(driver, "light")
    requests(driver), complaints(driver)  # what other tests left
    found = Page(driver, shared[1])
    found.open()
    yield found
    driver.get("about:blank")  # while the server is there: a page that loses it complains


def test_load_slide_compare_save_and_reload_with_the_demo_model(driver, tmp_path, screenshots):
    import abliterate as ab

    h = ab.load(ab.demo_model())
    prompts = ab.load_sides("bundled", "bundled", limit_train=12, limit_validation=4, limit_test=4)
    directions = ab.difference_of_means(ab.collect(h, prompts.target.train, prompts.baseline.train))
    edit = ab.Edit.uniform(ab.find_writers(h), directions.unit[15, 0, -1])
    ab.save_recipe(ab.recipe_for(edit, h), tmp_path / "found.safetensors")
    del h
    sized(driver, *WIDE)
    requests(driver), complaints(driver)
    with studio(tmp_path) as address:
        page = Page(driver, address)
        page.open()
        assert page.text("status") == "No model is loaded."
        page.type("model", "demo")
        page.type("recipe", "found.safetensors")
        page.click("load")
        page.until(lambda: "30 layers" in page.text("status") and "found.safetensors" in page.text("status"))
        assert (page.value("model"), page.value("recipe")) == ("demo", "found.safetensors")
        page.tokens(16)
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
        page.open()
        page.type("model", "demo")
        page.type("recipe", "mine.safetensors")
        page.click("load")
        page.until(lambda: "mine.safetensors" in page.text("status"))
        page.tokens(16)
        page.type("prompt", "Name three rivers in Europe.")
        page.click("ask")
        assert page.answers("strength 1") == (original, scaled)
        page.clean()
        driver.get("about:blank")
        with pytest.raises(ConnectionRefusedError):  # served on 127.0.0.1 alone, not on another name for this machine
            socket.create_connection(("127.0.0.2", int(address.rpartition(":")[2])))
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
        driver.get("about:blank")
        driver.close()
    finally:
        driver.switch_to.window(first)
    same = page.answers("strength 0")
    assert same[0] == same[1] == strong[0]


def test_frontier_report_and_export(page, shared, downloads, screenshots):
    driver, folder = page.driver, shared[0]
    page.tab("Frontier")
    page.type("out", "out")
    page.until(lambda: "divergence 0.2 nats (chosen)" in page.text("point"))
    page.press(lambda: driver.find_elements("css selector", "#point input")[1])
    picked = "return document.querySelector('#svg .picked title')?.textContent"
    page.until(lambda: "4 of 8" in (page.run(picked) or ""))
    page.click("take")
    page.until(lambda: "frontier/01.safetensors" in page.text("status"))
    assert page.value("recipe") == "out/frontier/01.safetensors"
    page.click("make-report")
    page.until(lambda: driver.find_elements("id", "report") and page.text("report"))
    picture(driver, screenshots / "studio-frontier.png")
    page.type("recipe", "out/frontier/00.safetensors")
    page.click("load")  # its run is chosen by itself
    page.until(lambda: "frontier/00.safetensors" in page.text("status") and "1 of 8" in (page.run(picked) or ""))
    assert page.value("out") == "out"
    page.click("make-report")
    page.until(lambda: driver.find_elements("id", "report") and page.text("report"))
    page.click("report")
    page.until(lambda: (downloads / "report.html").is_file())
    assert (downloads / "report.html").read_text() == (folder / "out" / "report.html").read_text()
    page.tab("Keep")
    page.type("form", "adapter")
    page.type("export-name", "lora")
    page.click("export")
    page.until(lambda: "Wrote lora as adapter" in page.text("exported"))
    picture(driver, screenshots / "studio-keep.png")
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    page.clean()


def test_a_run_is_started_watched_and_stopped(page, shared, screenshots):
    driver, folder = page.driver, shared[0]
    for name in ("river", "colour"):  # so many that the run doesn't end before it is stopped
        (folder / f"{name}s.txt").write_text("".join(f"Name the {name} {number}.\n" for number in range(30_000)))
    before = {path.name for path in folder.iterdir()}
    page.tab("Run")
    page.type("method", "sweep")
    page.type("target", "rivers.txt")
    page.type("baseline", "colours.txt")
    page.type("train", "20000")
    page.click("start")
    page.until(lambda: "Starting" in page.text("progress") or " of " in page.text("progress"))
    page.until(lambda: driver.find_elements("css selector", "#progress progress"))
    picture(driver, screenshots / "studio-run.png")
    said = page.text("progress")
    assert "loading model" in said and str(folder) not in said
    page.click("halt")
    page.until(lambda: "studio-run was stopped" in page.text("progress"))
    assert {path.name for path in folder.iterdir()} == before
    page.clean()


def test_what_goes_wrong_is_one_line(page, shared, tmp_path):
    driver, folder = page.driver, shared[0]
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
    page.type("export-name", "out")
    page.click("export")
    said = page.complains()
    assert "out" in said and "not empty" in said and str(folder) not in said
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"\0" * 64)
    upload = "#controls input[type=file]"
    driver.find_element("css selector", upload).send_keys(str(wrong))
    assert "not a whole safetensors file" in page.complains()
    right = tmp_path / "right.safetensors"
    right.write_bytes((folder / "recipe.safetensors").read_bytes())
    driver.find_element("css selector", upload).send_keys(str(right))
    page.until(lambda: "recipe right.safetensors (uploaded)" in page.text("status"))
    assert page.value("recipe") == "right.safetensors (uploaded)"
    page.slide("overall", 2)
    page.click("load")  # the uploaded one, though it lies in no folder
    page.until(lambda: page.field("overall").get_attribute("value") == "1")
    assert "recipe right.safetensors (uploaded)" in page.text("status")
    assert not (tmp_path / "x.safetensors").exists()


def test_on_a_phone_and_in_the_dark(page, screenshots):
    driver = page.driver
    page.click("ask")
    page.answers("strength 1")
    page.tab("Grid")
    page.type("prompts", "Name a river.\nName a colour.")
    page.click("compare")
    page.until(lambda: "judged by words" in page.text("table"))
    for name in ("Talk", "Grid", "Frontier", "Run", "Keep"):
        page.tab(name)
        sized(driver, *PHONE, mobile=True)
        page.until(lambda: page.run("return document.documentElement.scrollWidth") <= PHONE[0])
        if name == "Talk":  # the conversation comes first
            top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
            assert page.run(top, "prompt") < page.run(top, "controls")
        picture(driver, screenshots / f"studio-phone-{name.lower()}.png")
        sized(driver, *WIDE)
    page.tab("Talk")
    prefer(driver, "dark")
    page.open()
    colour = "return getComputedStyle(document.body).backgroundColor"
    page.until(lambda: int(page.run(colour).strip("rgb()").split(",")[0]) < 60)
    picture(driver, screenshots / "studio-dark.png")
    page.clean()


def test_a_password_is_asked_for_on_the_page(driver, template):
    sized(driver, *WIDE)
    requests(driver), complaints(driver)
    with studio(template, "--password", "let me in") as address:
        driver.get(address)
        page = Page(driver, address)
        page.until(lambda: driver.find_elements("css selector", "input[type=password]"))
        assert not driver.find_elements("id", "ask")

        def entered():
            fields = driver.find_elements("css selector", "input")
            for field, text in zip(fields, ("me", "let me in"), strict=True):
                field.clear()
                field.send_keys(text)
            return [field.get_attribute("value") for field in fields] == ["me", "let me in"]

        page.until(entered)
        page.press(lambda: driver.find_element("xpath", "//button[normalize-space()='Login']"))
        page.until(lambda: driver.find_elements("id", "ask"))
        assert [url for url in requests(driver) if not url.startswith((address, "ws://127.0.0.1"))] == []
        driver.get("about:blank")
