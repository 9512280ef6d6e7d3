"""The app as a person sees it: a real Chromium, a real server, the embedded checkpoint."""

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="needs the extra demo")
pytest.importorskip("selenium", reason="needs selenium")
if shutil.which("chromium") is None:
    pytest.skip("needs Debian's chromium and chromium-driver", allow_module_level=True)

from app.space import build_space  # noqa: E402


ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "scripts" / "screenshot.py")
screenshot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(screenshot)


@pytest.fixture(scope="module")
def address():
    with screenshot.running_app() as address:
        yield address


@pytest.fixture
def page(address):
    page = screenshot.AppPage(address)
    yield page
    page.close()


def test_ask_and_ask_again(page):
    page.upload(ROOT / "demo" / "scene.png")
    page.wait(page.overlay)

    # Another question brings other patches back, before it is even sent.
    page.type_question("What word is under the lemon?")
    page.wait(lambda: "recovered for the question" in page.text("counts"))
    page.submit()
    page.wait(lambda: "of 576 visual tokens" in page.text("full"))
    assert "RAIN" in page.text("compressed") and "RAIN" in page.text("full")
    assert "576 of 576 visual tokens" in page.text("full")
    assert "576 of 576 visual tokens" not in page.text("compressed")

    first = page.overlay()
    page.type_question("What color is the plate of the penguin?")
    page.wait(lambda: page.overlay() not in ("", first))
    page.submit()
    page.wait(lambda: page.text("full").count("of 576 visual tokens") == 2)
    assert page.text("compressed").count("What word is under the lemon?") == 1

    budget = page.driver.find_element("css selector", "#budget input[type=number]")
    budget.send_keys(screenshot.Keys.CONTROL, "a")
    budget.send_keys("30", screenshot.Keys.TAB)
    page.wait(lambda: page.text("counts").startswith("30 of 576"))

    budget.send_keys(screenshot.Keys.CONTROL, "a")
    budget.send_keys("0", screenshot.Keys.TAB)
    page.driver.find_element("css selector", "#preset input[value=paper]").click()
    page.wait(lambda: not page.text("counts").startswith("30 of 576") and " 1 merged" not in page.text("counts"))

    page.remove_picture()
    page.wait(lambda: "RAIN" not in page.text("compressed"))


def test_mistakes_become_messages(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    page.upload(broken)
    page.wait(lambda: "'broken.png' is no picture" in page.message())
    assert "Traceback" not in page.driver.page_source

    page.remove_picture()
    page.type_question("why?")
    page.submit()
    page.wait(lambda: "Upload or pick a picture." in page.message())

    page.upload(ROOT / "demo" / "scene.png")
    page.wait(page.overlay)
    page.type_question("")
    page.submit()
    page.wait(lambda: "Type a question." in page.message())


def test_too_large_an_upload_is_refused(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes((ROOT / "demo" / "scene.png").read_bytes() + bytes(11_000_000))
    page.upload(large)
    page.wait(lambda: "size" in page.message().lower())
    assert not page.overlay()


def test_space_starts_by_itself(tmp_path, monkeypatch):
    """The folder alone, with neither this repository nor its installed package in reach."""
    space = tmp_path / "space"
    monkeypatch.chdir(ROOT)
    build_space(space)
    with pytest.raises(ValueError, match="exists"):
        build_space(space)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with screenshot.running_app(sys.executable, "start.py", cwd=space) as address:
        config = json.loads(urllib.request.urlopen(f"{address}/config", timeout=30).read())
    assert config["title"] == "Recoverable LLaVA"
    assert any("`model`" in str(component["props"].get("value")) for component in config["components"])


def test_start_without_a_checkpoint():
    command = [sys.executable, "-m", "app", "--model", "./nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "There is no folder './nowhere'" in result.stderr and "Traceback" not in result.stderr
