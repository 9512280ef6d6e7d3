"""Training through the compressed model: gradients, Trainer, LoRA."""

import peft
import pytest
import torch
from batches import GREEDY, PROMPTS, batch_of
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


def test_gradients_with_and_without_checkpointing(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    model.train()

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    trained = ("language_model", "lm_head", "multi_modal_projector", "vision_tower")
    for part in trained:
        assert any(part in name and grad.abs().sum() > 0 for name, grad in plain.items()), part
    assert not any("question_tower" in name or "visual_projection" in name for name in plain)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)


def test_gradient_of_a_kept_patch_reaches_the_pixels(model, processor, pictures):
    inputs = batch_of(processor, pictures, PROMPTS[:1])
    inputs["pixel_values"].requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert inputs["pixel_values"].grad.abs().sum() > 0


class Conversations(Dataset):
    def __init__(self, processor, pictures):
        texts = [prompt + answer for prompt, answer in zip(PROMPTS, (" red</s>", " 2</s>", " no</s>"))]
        self.batch = batch_of(processor, pictures, texts)
        self.batch["labels"] = self.batch["input_ids"].masked_fill(self.batch["attention_mask"] == 0, -100)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def trainer_for(model, dataset, folder, steps):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    return Trainer(model=model, args=arguments, train_dataset=dataset)


def test_trainer_trains_and_predicts(model, processor, pictures, tmp_path):
    dataset = Conversations(processor, pictures)
    trainer = trainer_for(model, dataset, tmp_path, steps=12)
    before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(dataset)["eval_loss"] < 0.7 * before
    predictions = trainer.predict(dataset)
    logits = predictions.predictions[0] if isinstance(predictions.predictions, tuple) else predictions.predictions
    assert logits.shape[:2] == predictions.label_ids.shape


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_lora(model, processor, pictures, tmp_path):
    dataset = Conversations(processor, pictures)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    adapted = peft.get_peft_model(model, settings)
    trainer = trainer_for(adapted, dataset, tmp_path / "run", steps=20)
    before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(dataset)["eval_loss"] < before
    adapted.eval()
    inputs = batch_of(processor, pictures)
    expected = adapted(**inputs).logits
    assert adapted.generate(**inputs, **GREEDY).shape[1] > inputs["input_ids"].shape[1]

    adapted.save_pretrained(tmp_path / "adapter")
    base = adapted.unload()
    assert not torch.allclose(base(**inputs).logits, expected, atol=1e-4)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(again(**inputs).logits, expected, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded, info = type(merged).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = merged.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in reloaded.state_dict().items())
    assert torch.allclose(reloaded(**inputs).logits, merged(**inputs).logits, atol=1e-5)
