"""`python -m docs.scripts.screenshot`: start the app, ask as a person would, and take docs/pictures/app.png.

Needs the extra `demo`, selenium, and Debian's chromium and chromium-driver.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


ROOT = Path(__file__).parents[2]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1200"
)


@contextmanager
def running_app(*command: str, cwd: Path = ROOT) -> Iterator[str]:
    """The address of an app started by `command` and `--port`; by default the one of this repository."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command or (sys.executable, "-m", "app")
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=cwd, stdout=log, stderr=log)
        try:
            deadline = time.time() + 180
            while server.poll() is None and time.time() < deadline:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.3)
            else:
                log.seek(0)
                raise RuntimeError(f"The app did not start:\n{log.read()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


class AppPage:
    """The app in a headless Chromium, by what a person does there."""

    def __init__(self, address: str):
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        for flag in [*FLAGS.split(), f"--user-data-dir={self.profile.name}"]:
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.driver.get(address)
        self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#question textarea"))

    def wait(self, condition: object, seconds: float = 90) -> None:
        WebDriverWait(self.driver, seconds).until(lambda _: condition())

    def text(self, element_id: str) -> str:
        return self.driver.find_element(By.ID, element_id).text

    def upload(self, path: Path) -> None:
        self.remove_picture()
        self.driver.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(path))

    def remove_picture(self) -> None:
        for button in self.driver.find_elements(By.CSS_SELECTOR, '#picture button[aria-label="Remove Image"]'):
            button.click()
            self.wait(lambda: "Upload" in self.text("counts"))

    def type_question(self, question: str) -> None:
        box = self.driver.find_element(By.CSS_SELECTOR, "#question textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(question or Keys.DELETE)

    def set_number(self, element_id: str, value: str) -> None:
        box = self.driver.find_element(By.CSS_SELECTOR, f"#{element_id} input[type=number]")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(value, Keys.TAB)

    def pick_example(self, number: int) -> None:
        self.driver.find_elements(By.CSS_SELECTOR, "#examples button")[number].click()

    def submit(self) -> None:
        self.driver.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(Keys.ENTER)

    def overlay(self) -> str:
        """The address of the picture that is shown; another picture has another."""
        pictures = self.driver.find_elements(By.CSS_SELECTOR, "#overlay img")
        return pictures[0].get_attribute("src") if pictures else ""

    def message(self) -> str:
        """The text of the error messages on the page."""
        return " ".join(toast.text for toast in self.driver.find_elements(By.CSS_SELECTOR, ".toast-body"))

    def resize(self, width: int) -> None:
        """A window of this width, and high enough for the whole page."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(1)
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})

    def save(self, path: Path) -> None:
        time.sleep(3)  # animations
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(path))

    def box(self, element_id: str) -> dict[str, float]:
        """Where an element is: left, top, right and bottom, in pixels of the page."""
        script = "const b = document.getElementById(arguments[0]).getBoundingClientRect(); return b.toJSON()"
        return self.driver.execute_script(script, element_id)

    def close(self) -> None:
        self.driver.quit()
        self.profile.cleanup()


def main() -> None:
    with running_app() as address:
        page = AppPage(address)
        try:
            page.wait(page.overlay)
            page.pick_example(3)
            page.wait(lambda: "Is the fish below the snake?" in page.text("full"))
            page.resize(1280)
            page.save(ROOT / "docs" / "pictures" / "app.png")
        finally:
            page.close()


if __name__ == "__main__":
    main()
