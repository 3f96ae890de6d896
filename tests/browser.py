"""A headless Chromium for tests: found, or installed once where the machine allows it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ["chromium", "chromium-driver"]
BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)


def _found(names: tuple[str, ...]) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


@cache
def _install() -> str:
    """Install Debian's Chromium; returns why that failed, or nothing."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "it isn't installed, and only root on Debian or Ubuntu can install it here"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        except subprocess.TimeoutExpired:
            return f"{' '.join(command[:2])} took more than 15 minutes"
        if done.returncode and command[1] == "install":  # an update may fail in part and still be enough
            return f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}"
    return ""


@contextlib.contextmanager
def chromium(
    *, width: int = 1200, height: int = 900, dark: bool = False, served: bool = False, downloads: Path | None = None
) -> Iterator[Any]:
    """A selenium driver that logs what the page says and asks for; skips the test where there is no Chromium.

    Args:
        width, height: of the viewport, in CSS pixels.
        dark: whether the system prefers dark pages.
        served: let it reach servers on 127.0.0.1; it never reaches any other.
        downloads: folder for what is downloaded.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")
    if not (_found(BROWSERS) and _found(DRIVERS)):
        why = _install()
        if why or not (_found(BROWSERS) and _found(DRIVERS)):
            pytest.skip(f"no Chromium to drive: {why or 'installed, but not found'}")
    options = webdriver.ChromeOptions()
    options.binary_location = _found(BROWSERS)
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-component-update", "--disable-background-networking", "--disable-sync",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
            "--host-resolver-rules=MAP * ~NOTFOUND" + (", EXCLUDE 127.0.0.1" if served else ""),
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(_found(DRIVERS)))
        try:
            driver.set_script_timeout(120)
            if downloads is not None:
                allowed = {"behavior": "allow", "downloadPath": str(downloads)}
                driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
            sized(driver, width, height)
            if dark:
                prefer(driver, "dark")
            yield driver
        finally:
            driver.quit()


def sized(driver: Any, width: int, height: int, *, mobile: bool = False) -> None:
    """Give the page a viewport of this many CSS pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Any, scheme: str) -> None:
    """Have the system prefer light or dark."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def opened(driver: Any, file: Path) -> Any:
    """Open a report and wait until its charts are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(file.absolute().as_uri())
    WebDriverWait(driver, 120).until(lambda d: d.execute_script("return document.documentElement.dataset.drawn"))
    return driver


def requests(driver: Any) -> list[str]:
    """Addresses that the page asked a server for."""
    asked = []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            parameters = message["params"]
            asked.append(parameters.get("url") or parameters["request"]["url"])
    return [url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:", "ftp:"))]


def complaints(driver: Any) -> list[str]:
    """Errors and warnings of the console."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def picture(driver: Any, path: Path) -> None:
    """The whole page as a PNG."""
    import base64

    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    path.write_bytes(base64.b64decode(shot["data"]))


def printed(driver: Any, path: Path) -> None:
    """The page as it prints."""
    import base64

    pdf = driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    path.write_bytes(base64.b64decode(pdf["data"]))


def eventually(driver: Any, script: str, expected: Any, seconds: float = 20.0) -> None:
    """Wait until a script gives what is expected: a page draws when it comes to it."""
    end = time.monotonic() + seconds
    while (found := driver.execute_script(script)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    assert found == expected
