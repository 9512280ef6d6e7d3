"""What users of a published repository do, in processes of their own: load, pin, ask, push, all against loopback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from batches import answers as answers_of
from batches import both_families
from command_line import REPO_ID, run_hub_upload
from loopback_hub import LoopbackHub
from PIL import Image

from hub_upload.build import build
from recoverable_llava.tools.families import FAMILIES


pytestmark = both_families

PRIVATE_ID, CHANGED_ID, BUDGET_ID = "writer/private", "writer/changed", "writer/budget"

LOADING = """
import json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

torch.set_num_threads(1)
REPO, ANSWERS = sys.argv[1], {}
IMAGE = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L")])
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the colour of the cat?"}]}]

def load(repo=REPO, model_class=AutoModelForImageTextToText, **where):
    model, info = model_class.from_pretrained(repo, trust_remote_code=True, output_loading_info=True, **where)
    if model_class is AutoModel:  # as with stock LLaVA, the model without its head has no use for it
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.endswith("lm_head.weight")]
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model.eval()

def inputs_of(repo=REPO, **where):
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **where)
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    return processor(images=IMAGE, text=prompt, return_tensors="pt")

def answer(model, inputs):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:].tolist()
"""

USING = (
    LOADING
    + """
model, inputs = load(), inputs_of()
ANSWERS["answer"] = answer(model, inputs)
ANSWERS["tokens"] = int(model.recover_tokens(**inputs).selection.num_tokens)
ANSWERS["threshold"] = model.config.lof_threshold
pinned = load(revision=sys.argv[2])
ANSWERS["pinned threshold"] = pinned.config.lof_threshold
assert answer(pinned, inputs_of(revision=sys.argv[2])) != []

for model_class in (AutoModel, AutoModelForMultimodalLM):
    other = load(model_class=model_class)
    if model_class is not AutoModel:
        assert answer(other, inputs) == ANSWERS["answer"]
ANSWERS["model_type"] = AutoConfig.from_pretrained(REPO, trust_remote_code=True).model_type

from transformers import pipeline
ask = pipeline(model=REPO, trust_remote_code=True)  # no task: the card's pipeline_tag says it
chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, CHAT[0]["content"][1]]}]
settings = {"min_new_tokens": 6, "do_sample": False}
said = ask(text=chat, max_new_tokens=6, return_full_text=False, generate_kwargs=settings)
processor = AutoProcessor.from_pretrained(REPO, trust_remote_code=True)
ANSWERS["pipeline agrees"] = said[0]["generated_text"] == processor.decode(ANSWERS["answer"], skip_special_tokens=True)

try:
    AutoModelForImageTextToText.from_pretrained(REPO)
except (ValueError, EOFError) as error:
    ANSWERS["without trust"] = str(error)

with torch.no_grad():
    model.lm_head.weight.mul_(-1)
model.config.lof_threshold = 3.0
model.push_to_hub(sys.argv[3])
processor.push_to_hub(sys.argv[3])
ANSWERS["changed"] = answer(model, inputs)
again = load(sys.argv[3])
ANSWERS["changed again"] = answer(again, inputs_of(sys.argv[3]))
ANSWERS["changed threshold"] = again.config.lof_threshold
weights = zip(model.state_dict().values(), again.state_dict().values())
ANSWERS["equal weights"] = all(torch.equal(ours, theirs) for ours, theirs in weights)
print("\\n" + json.dumps(ANSWERS))
"""
)

ASKING = LOADING + "\nprint(json.dumps({'answer': answer(load(), inputs_of())}))\n"


def python(hub: LoopbackHub, home: Path, script: str, *arguments: str, token: str | None = "hf_writer", **environment):
    """Runs a user's script; the package is not importable in it."""
    return subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        env={**hub.environment(home, token), **environment},
        cwd=home.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def answers(run: subprocess.CompletedProcess) -> dict:
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def world(tmp_path_factory, base, clip, built_once):
    """A Hub with a public repository of two commits and a private one."""
    folder = tmp_path_factory.mktemp("world")
    later = build(str(base), folder / "later", clip=str(clip), **tiny.RECOVERY, lof_threshold=2.5)
    budget = build(str(base), folder / "budget", clip=str(clip), **tiny.RECOVERY, visual_token_budget=9)
    with LoopbackHub() as hub:
        for arguments in (
            (budget, BUDGET_ID),
            (built_once, REPO_ID),
            (built_once, PRIVATE_ID, "--private"),
            (later, REPO_ID),
        ):
            run = run_hub_upload(hub, folder, "publish", *arguments)
            assert run.returncode == 0, run.stderr
        yield hub, folder


@pytest.fixture(scope="module")
def used(world):
    """What a user's script reports; the checks below read it."""
    hub, folder = world
    first = next(oid for oid, commit in hub.repos[REPO_ID].commits.items() if "config.json" in commit.files)
    return answers(python(hub, folder / "user", USING, REPO_ID, first, CHANGED_ID))


# The script's picture is square, and large enough for all four tiles of a LLaVA-NeXT.
NUM_PATCHES = {"llava": tiny.NUM_PATCHES, "llava_next": 5 * tiny.NUM_PATCHES}


def test_loads_answers_and_pins(used, family):
    assert len(used["answer"]) == 6
    assert 0 < used["tokens"] < NUM_PATCHES[family]
    assert (used["threshold"], used["pinned threshold"]) == (2.5, 1.5)
    assert used["model_type"] == f"recoverable_{family}"


def test_answers_as_the_package_does(used, world, family):
    classes, folder = FAMILIES[family], world[1] / "later"
    picture = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L")])
    content = [{"type": "image"}, {"type": "text", "text": "what is the colour of the cat?"}]
    processor = classes.processor_class.from_pretrained(folder)
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    model = classes.model_class.from_pretrained(folder).eval()
    assert model.recover_tokens(**inputs).selection.chosen.shape[1] == NUM_PATCHES[family]
    assert answers_of(model, inputs, min_new_tokens=6)[0].tolist() == used["answer"]


def test_pipeline_needs_no_task_and_agrees(used):
    assert used["pipeline agrees"]


def test_without_trust_the_error_says_what_to_do(used):
    assert "trust_remote_code=True" in used["without trust"]


def test_push_to_hub_of_a_changed_model_reloads_equal(used, world):
    hub, _ = world
    assert used["changed"] == used["changed again"] != used["answer"]
    assert used["equal weights"]
    assert used["changed threshold"] == 3.0
    pushed, original = hub.main_files(CHANGED_ID), hub.main_files(REPO_ID)
    code = {name for name in original if name.endswith(".py")}
    assert code == {name for name in pushed if name.endswith(".py")}
    for name in code:
        assert pushed[name].content == original[name].content, name
    maps = [json.loads(files["config.json"].content)["auto_map"] for files in (pushed, original)]
    assert set(maps[0]) == set(maps[1])
    assert {"question_tokenizer/tokenizer.json", "tokenizer.json", "chat_template.jinja"} <= set(pushed)
    assert "AutoProcessor" in json.loads(pushed["processor_config.json"].content)["auto_map"]


def test_offline_after_caching(used, world):
    hub, folder = world
    hub.requests.clear()
    run = answers(python(hub, folder / "user", ASKING, REPO_ID, token=None, HF_HUB_OFFLINE="1"))
    assert run["answer"] == used["answer"]
    assert hub.requests == []


def test_private_repository_with_and_without_token(world):
    hub, folder = world
    assert len(answers(python(hub, folder / "owner", ASKING, PRIVATE_ID))["answer"]) == 6
    stranger = python(hub, folder / "stranger", ASKING, PRIVATE_ID, token=None)
    assert stranger.returncode != 0
    assert "private" in stranger.stderr and "token" in stranger.stderr


def test_verify_a_published_repository(world):
    hub, folder = world
    run = run_hub_upload(hub, folder, "verify", REPO_ID)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all checks passed" in run.stdout


SWITCHED_OFF = """
inputs = processor(images=IMAGE, text="USER: <image>\\nwhy? ASSISTANT:", return_tensors="pt")
assert int((inputs["input_ids"] == model.config.image_token_id).sum()) >= 36
assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
"""


@pytest.mark.parametrize("repo_id", [REPO_ID, BUDGET_ID])
def test_code_on_the_card_runs(world, family, pictures, repo_id):
    hub, folder = world
    pictures[0].save(folder / "photo.jpg")
    card = hub.main_files(repo_id)["README.md"].content.decode()
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL))
    assert script.count("trust_remote_code=True") == 3 and "OWNER/NAME" not in card
    opened = "from PIL import Image\nIMAGE = Image.open('photo.jpg')\n"
    run = python(hub, folder / "reader", script + opened + SWITCHED_OFF)
    assert run.returncode == 0, run.stderr[-3000:]
    answers_of_both, _, count = run.stdout.partition("tensor([")
    middle = len(answers_of_both) // 2
    assert answers_of_both[:middle] == answers_of_both[middle:] != ""
    kept = int(count.partition("]")[0])
    assert (kept == 9) if repo_id == BUDGET_ID else (0 < kept < NUM_PATCHES[family])
