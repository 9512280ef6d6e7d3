"""A model loaded from a repository is changed and saved: nothing that the Hub needs gets lost."""

import json
import os
import subprocess
import sys

from batches import both_families

from hub_upload.checkpoint import read_json
from hub_upload.remote_code import executed_files


SCRIPT = """
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
SOURCE, TARGET = sys.argv[1:]

def load(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()

def inputs_of(folder):
    from PIL import Image
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor, processor(images=Image.radial_gradient("L").convert("RGB"), text=prompt, return_tensors="pt")

model = load(SOURCE)
processor, inputs = inputs_of(SOURCE)
with torch.no_grad():
    before = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    after = merged(**inputs).logits
    merged.save_pretrained(TARGET)
    processor.save_pretrained(TARGET)
    again, (_, same_inputs) = load(TARGET), inputs_of(TARGET)
    assert all(torch.equal(inputs[name], same_inputs[name]) for name in inputs)
    reloaded, saved = again(**same_inputs).logits, merged.state_dict()
print("\\n" + json.dumps({
    "adapter changes": not torch.equal(before, after),
    "same weights": saved.keys() == again.state_dict().keys() and all(
        torch.equal(saved[name], weight) for name, weight in again.state_dict().items()
    ),
    # Some processors' kernels round by where in memory a weight lies.
    "reloads equal": torch.allclose(after, reloaded, rtol=0, atol=1e-5),
    "remote": type(again).__module__.startswith("transformers_modules."),
}))
"""


@both_families
def test_lora_merged_model_saves_whole_and_reloads_equal(built, tmp_path):
    target = tmp_path / "merged"
    run = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(built), str(target)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {"adapter changes": True, "same weights": True, "reloads equal": True, "remote": True}
    code = executed_files(built, read_json(built / "config.json")["auto_map"])
    assert sorted(path.name for path in target.glob("*.py") if path.name != "__init__.py") == code
    for name in code:
        assert (built / name).read_bytes() == (target / name).read_bytes(), name
    assert set(read_json(target / "config.json")["auto_map"]) == set(read_json(built / "config.json")["auto_map"])
    assert "AutoProcessor" in read_json(target / "processor_config.json")["auto_map"]
    assert (target / "question_tokenizer" / "tokenizer.json").is_file()
    assert (target / "chat_template.jinja").read_text() == (built / "chat_template.jinja").read_text()
