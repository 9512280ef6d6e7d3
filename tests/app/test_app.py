"""The app as people see it: a real Chromium, a real server, the embedded checkpoint, one visitor or two at once."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image


gradio = pytest.importorskip("gradio", reason="needs the extra demo")
pytest.importorskip("selenium", reason="needs selenium")
if shutil.which("chromium") is None:
    pytest.skip("needs Debian's chromium and chromium-driver", allow_module_level=True)

from app.interface import CSS, EXAMPLES, LARGE_EXAMPLES, LARGEST_UPLOAD, THEME, build_interface  # noqa: E402
from app.shared_model import SharedModel  # noqa: E402
from app.space import build_space  # noqa: E402
from recoverable_llava.tools.asking import load  # noqa: E402
from recoverable_llava.tools.combine import combine  # noqa: E402


ROOT = Path(__file__).parents[2]
SCENE = ROOT / "demo" / "scene.png"
OUTPUT = ROOT / "output" / "tests"  # screenshots, to look at
_spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "scripts" / "screenshot.py")
screenshot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(screenshot)


@pytest.fixture(scope="module")
def used():
    """What the model did, in order: "preview" or "answers", when it began and when it ended."""
    return []


@pytest.fixture(scope="module")
def address(used):
    """The app in this process, so that what the model does can be counted."""
    interface = build_interface(*load(str(ROOT / "checkpoints" / "tiny"), "cpu"), "checkpoints/tiny")
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (("preview", "_recover_if_free"), ("answers", "answers")):
            patch.setattr(SharedModel, name, _recorded(getattr(SharedModel, name), kind, used))
        _, address, _ = interface.queue(max_size=32).launch(
            prevent_thread_lock=True, css=CSS, theme=THEME, quiet=True, max_file_size=LARGEST_UPLOAD
        )
        yield address
        interface.close()


def _recorded(method, kind, used):
    def recorded(*arguments):
        began = time.time()
        result = method(*arguments)
        if result is not None:
            used.append((kind, began, time.time()))
        return result

    return recorded


@pytest.fixture
def page(address):
    page = screenshot.AppPage(address)
    page.wait(page.overlay)
    yield page
    page.close()


@pytest.fixture
def other_page(address):
    page = screenshot.AppPage(address)
    page.wait(page.overlay)
    yield page
    page.close()


def test_opens_with_an_example_answered(page, used):
    """An overlay, both answers, no empty box, and nothing to wait for: the model does not run for it."""
    used.clear()
    assert page.driver.find_elements("css selector", "#picture img")
    assert "recovered for the question" in page.text("counts")
    for chat in ("compressed", "full"):
        assert (
            EXAMPLES[0][1] in page.text(chat)
            and "RAIN" in page.text(chat)
            and "of 576 visual tokens" in page.text(chat)
        )
    time.sleep(2)
    assert used == []


def test_says_what_one_has_to_know(page):
    text = page.driver.find_element("tag name", "body").text
    assert "sees its centre square only" in text
    assert "default, this project's own" in text and "paper, as published" in text
    assert "knows drawn scenes like these, and nothing else" in text


def test_looks_right_on_a_desk_and_on_a_telephone(page):
    """Look at the pictures in `output/tests`."""
    page.resize(1280)
    page.save(OUTPUT / "app_1280.png")
    assert page.box("examples")["bottom"] < 800 and page.box("overlay")["bottom"] < 800  # above the fold
    compressed, full = page.box("compressed"), page.box("full")
    assert compressed["top"] == full["top"] and compressed["right"] <= full["left"]

    page.resize(400)
    page.save(OUTPUT / "app_400.png")
    compressed, full = page.box("compressed"), page.box("full")
    assert full["top"] >= compressed["bottom"]
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 400
    for element in ("picture", "question", "examples", "counts", "overlay", "compressed", "full", "preset", "budget"):
        box = page.box(element)
        assert box["left"] >= 0 and box["right"] <= 400 and box["width"] > 250, element
    overlay = page.driver.find_element("css selector", "#overlay img").rect
    assert overlay["width"] == pytest.approx(page.box("overlay")["width"], abs=4)  # no margins beside a square picture
    assert overlay["height"] == pytest.approx(page.box("overlay")["height"], abs=4)


def test_ask_and_ask_again(page):
    page.upload(SCENE)
    page.wait(lambda: "RAIN" not in page.text("compressed"))  # another picture, another conversation

    # Another question brings other patches back, before it is even sent.
    first = page.overlay()
    page.type_question("What color is the plate of the penguin?")
    page.wait(lambda: page.overlay() not in ("", first))
    page.submit()
    page.wait(lambda: "of 576 visual tokens" in page.text("full"))
    assert "red" in page.text("compressed") and "red" in page.text("full")
    assert "576 of 576 visual tokens" in page.text("full")
    assert "576 of 576 visual tokens" not in page.text("compressed")

    first = page.overlay()
    page.type_question("What word is under the lemon?")
    page.wait(lambda: page.overlay() not in ("", first))
    page.submit()
    page.wait(lambda: page.text("full").count("of 576 visual tokens") == 2)
    assert page.text("compressed").count("What color is the plate of the penguin?") == 1

    page.driver.find_element("id", "again").click()
    page.wait(lambda: "red" not in page.text("compressed") and "red" not in page.text("full"))
    assert page.overlay()

    page.submit()
    page.wait(lambda: "RAIN" in page.text("full"))
    page.remove_picture()
    page.wait(lambda: "RAIN" not in page.text("compressed"))
    page.wait(lambda: not page.overlay())


def test_settings(page):
    slider = "#threshold_default input[type=range]"
    page.wait(lambda: page.driver.find_element("css selector", slider).is_enabled())
    page.set_number("budget", "30")
    page.wait(lambda: page.text("counts").startswith("30 of 576"))
    # The threshold decides nothing now, says so, and looks it.
    page.wait(lambda: not page.driver.find_element("css selector", slider).is_enabled())
    assert "No effect" in page.text("threshold_default")
    page.set_number("budget", "0")
    page.wait(lambda: page.driver.find_element("css selector", slider).is_enabled())
    page.wait(lambda: not page.text("counts").startswith("30 of 576"))
    assert "No effect" not in page.text("threshold_default")

    # Higher keeps fewer.
    before = int(page.text("counts").split()[0])
    page.set_number("threshold_default", "0.5")
    page.wait(lambda: int(page.text("counts").split()[0]) < before)

    page.driver.find_element("css selector", "#preset input[value=paper]").click()
    page.wait(lambda: "1 merged" not in page.text("counts") or "LOF" in page.text("threshold_paper"))
    page.wait(lambda: not page.driver.find_elements("css selector", "#threshold_default input"))
    page.set_number("budget", "30")
    page.wait(lambda: page.text("counts").startswith("30 of 576"))
    # As published, the threshold shares the budget among the kinds.
    assert page.driver.find_element("css selector", "#threshold_paper input[type=range]").is_enabled()


def test_pictures_to_try_are_answered_at_a_click(page):
    page.pick_example(3)
    page.wait(lambda: EXAMPLES[3][1] in page.text("full"))
    assert "What word" not in page.text("full")
    assert page.driver.find_element("css selector", "#question textarea").get_attribute("value") == EXAMPLES[3][1]
    page.wait(lambda: "of 576 visual tokens" in page.text("compressed"))
    page.type_question("Is there a snake in the picture?")
    page.submit()
    page.wait(lambda: page.text("full").count("of 576 visual tokens") == 2)


def test_a_photo_is_none_of_its_scenes(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((900, 600)).save(tmp_path / "photo.jpg")
    assert not page.driver.find_elements("id", "notice") or not page.text("notice")
    page.upload(tmp_path / "photo.jpg")
    page.wait(lambda: "knows nothing else" in page.text("notice"))
    page.save(OUTPUT / "app_photo.png")
    page.upload(SCENE)
    page.wait(lambda: not page.driver.find_elements("id", "notice") or not page.text("notice"))


def in_the_way(used):
    """The previews that ran while an answer was waited for."""
    ((asked, answered),) = [times for kind, *times in used if kind == "answers"]
    return [entry for entry in used if entry[0] == "preview" and entry[2] > asked and entry[1] < answered]


def test_one_visitors_typing_costs_another_nothing(page, other_page, used):
    """While one types, the other's answer waits for one preview at most; the typist gets the last one."""
    used.clear()
    box = page.driver.find_element("css selector", "#question textarea")
    box.send_keys(screenshot.Keys.CONTROL, "a")
    other_page.type_question("What color is the plate of the penguin?")
    other_page.submit()
    for key in "Where is the cactus? What is right of it":
        box.send_keys(key)
    typed = time.time()
    other_page.wait(lambda: "red" in other_page.text("full"))
    page.wait(lambda: any(kind == "preview" and began > typed for kind, began, _ in used))
    time.sleep(2)
    assert len(in_the_way(used)) <= 1, used
    assert "red" not in page.text("full") and "RAIN" in page.text("full")  # each has a conversation of their own


def test_enter_does_not_wait_for_previews(page, used):
    used.clear()
    page.type_question("What color is the plate of the penguin?")
    page.submit()
    page.wait(lambda: "red" in page.text("full"))
    assert len(in_the_way(used)) <= 1, used


def test_two_visitors_at_once(page, other_page):
    """Different pictures, questions and settings at the same time, each their own answer."""
    page.upload(SCENE)
    other_page.pick_example(2)
    page.set_number("budget", "40")
    page.type_question("Where is the cactus?")
    page.submit()
    other_page.wait(lambda: EXAMPLES[2][1] in other_page.text("full"))
    page.wait(lambda: "Where is the cactus?" in page.text("full"))
    assert "40 of 576 visual tokens" in page.text("compressed")
    assert "40 of 576 visual tokens" not in other_page.text("compressed")
    assert "cactus" not in other_page.text("full") and "cookie" not in page.text("full")


def test_mistakes_become_messages(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    page.upload(broken)
    page.wait(lambda: "'broken.png' is no picture" in page.message())
    assert "Traceback" not in page.driver.page_source

    Image.new("RGB", (12_000, 1)).save(tmp_path / "strip.png")
    page.upload(tmp_path / "strip.png")
    page.wait(lambda: "'strip.png' has 12000 × 1 pixels" in page.message())

    page.remove_picture()
    page.type_question("why?")
    page.submit()
    page.wait(lambda: "Upload or pick a picture." in page.message())

    page.upload(SCENE)
    page.wait(page.overlay)
    page.type_question("")
    page.submit()
    page.wait(lambda: "Type a question." in page.message())


def test_too_large_an_upload_is_refused(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(SCENE.read_bytes() + bytes(11_000_000))
    page.upload(large)
    page.wait(lambda: "size" in page.message().lower())
    assert not page.overlay()


class Caller:
    """Who calls the server without the page."""

    def __init__(self, address):
        self.api = f"{address.rstrip('/')}/gradio_api"

    def upload(self, path):
        border = uuid.uuid4().hex
        head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()
        (uploaded,) = self._post("upload", body, f"multipart/form-data; boundary={border}")
        return self.file(uploaded)

    def file(self, path):
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    def answer(self, *data):
        """What the server says, as "complete" or "error" and the rest."""
        event = self._post("call/answer", json.dumps({"data": data}).encode(), "application/json")["event_id"]
        with urllib.request.urlopen(f"{self.api}/call/answer/{event}", timeout=120) as stream:
            kind, _, rest = stream.read().decode().removeprefix("event: ").partition("\n")
        return kind, rest

    def _post(self, path, body, kind):
        request = urllib.request.Request(f"{self.api}/{path}", body, {"Content-Type": kind})
        return json.loads(urllib.request.urlopen(request, timeout=120).read())


def test_who_calls_without_the_page_gets_no_further(address, tmp_path, used):
    """No file of the server's disk but those that were uploaded, and no value that the page does not offer."""
    caller, settings = Caller(address), ["default", 0.175, 1.5, 0]
    uploaded = caller.upload(SCENE)
    kind, rest = caller.answer(uploaded, "What word is under the lemon?", *settings)
    assert kind == "complete" and "RAIN" in rest

    used.clear()
    secret = tmp_path / "secret.png"
    shutil.copy(SCENE, secret)
    files = [caller.file(path) for path in (secret, SCENE, "checkpoints/tiny/config.json", "/etc/passwd", "/dev/zero")]
    for upload in [*files, None, {}, "x", {"path": None}, {"url": "http://127.0.0.1:1/x.png"}]:
        assert caller.answer(upload, "why?", *settings)[0] == "error", upload
    for values in (
        ["x" * 1001, *settings],
        [5, *settings],
        ["why?", "no preset", 0.175, 1.5, 0],
        ["why?", ["default"], 0.175, 1.5, 0],
        ["why?", "default", float("nan"), 1.5, 0],
        ["why?", "default", -1, 1.5, 0],
        ["why?", "paper", 0.175, None, 0],
        ["why?", "default", 0.175, 1.5, 577],
        ["why?", "default", 0.175, 1.5, 1e300],
        ["why?", "default", 0.175, 1.5, "30"],
    ):
        assert caller.answer(uploaded, *values)[0] == "error", values
    assert used == []
    assert caller.answer(uploaded, "why?", *settings)[0] == "complete"


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


@pytest.fixture(scope="module")
def tiled_address(clip_folder, tmp_path_factory):
    """The app with a tiny LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("llava_next")
    tiny.save_tiny_llava(folder, clip_folder, family="llava_next")
    interface = build_interface(*combine(str(folder), clip_folder, **tiny.RECOVERY), "tiny LLaVA-NeXT")
    _, address, _ = interface.queue().launch(prevent_thread_lock=True, css=CSS, theme=THEME, quiet=True)
    yield address
    interface.close()


def test_a_model_that_sees_tiles(tiled_address, tmp_path):
    """Numbers of each picture, the whole of it drawn, and a budget that one picture has room for, another not."""
    Image.effect_noise((90, 150), 50).save(tmp_path / "high.png")
    Image.effect_noise((1000, 21), 50).save(tmp_path / "narrow.png")
    page = screenshot.AppPage(tiled_address)
    try:
        page.wait(page.overlay)
        assert "sees all of it: in tiles" in page.driver.find_element("tag name", "body").text
        assert LARGE_EXAMPLES[0][1] in page.text("full") and "166 of 166 visual tokens" in page.text("full")
        limits = page.driver.find_element("css selector", "#budget input[type=range]")
        assert limits.get_attribute("max") == str(5 * tiny.NUM_PATCHES)

        first = page.overlay()
        page.upload(tmp_path / "high.png")
        page.wait(lambda: page.overlay() not in ("", first))
        page.set_number("budget", "76")
        page.wait(lambda: page.text("counts").startswith("76 of 144"))
        page.resize(1280)
        page.save(OUTPUT / "app_tiles.png")
        overlay = page.driver.find_element("css selector", "#overlay img").rect
        assert overlay["width"] > overlay["height"]  # both views of a high picture, side by side

        page.upload(tmp_path / "narrow.png")
        page.wait(lambda: "visual_token_budget is 76" in page.message())
        assert "lower it" in page.message()
    finally:
        page.close()
