"""Fine-tune with LoRA (peft and Trainer) through the compressed prompt; save the adapter, load it again, merge it.

A toy task, so that it takes seconds: the answer to one question about one picture is learned by heart.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments


try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError:
    sys.exit("This needs peft: pip install peft")
if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
image = Image.open("demo/scene.png").convert("RGB")
PROMPT, ANSWER = "USER: <image>\nWhat word is under the lemon? ASSISTANT:", " blue"


def collate(examples: list[dict]) -> dict:
    """A batch; only the answers are learned. Labels on image placeholders would be ignored anyway."""
    texts = [example["prompt"] + example["answer"] + processor.tokenizer.eos_token for example in examples]
    images = [example["image"] for example in examples]
    batch = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    prompts = processor(images=images, text=[example["prompt"] for example in examples])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt_ids in zip(labels, prompts["input_ids"]):
        row[: len(prompt_ids)] = -100
    return {**batch, "labels": labels}


lora = LoraConfig(r=8, lora_alpha=32, target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)")
trainer = Trainer(
    model=get_peft_model(model, lora),
    args=TrainingArguments(
        "output/lora",
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator needs the pictures
        disable_tqdm=True,
    ),
    train_dataset=[{"image": image, "prompt": PROMPT, "answer": ANSWER}] * 8,
    data_collator=collate,
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
trainer.model.save_pretrained("output/lora/adapter")

base = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
merged = PeftModel.from_pretrained(base, "output/lora/adapter").merge_and_unload()
inputs = processor(images=image, text=PROMPT, return_tensors="pt")
answer = merged.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
print("after merging the reloaded adapter:", processor.batch_decode(answer, skip_special_tokens=True)[0])
