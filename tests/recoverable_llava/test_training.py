"""Training through the compressed model: gradients, Trainer, LoRA."""

import peft
import pytest
import torch
from batches import GREEDY, PROMPTS, batch_of, both_families
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


@both_families
def test_gradients_with_and_without_checkpointing(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    model.train()

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    trained = ("language_model", "lm_head", "multi_modal_projector", "vision_tower")
    # A parameter that is in the graph, for data-parallel training, though its tokens are all dropped.
    assert not hasattr(model.model, "image_newline") or not plain["model.image_newline"].any()
    for part in trained:
        assert any(part in name and grad.abs().sum() > 0 for name, grad in plain.items()), part
    assert not any("question_tower" in name or "visual_projection" in name for name in plain)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)


@both_families
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


@both_families
def test_trainer_trains_and_predicts(model, processor, pictures, tmp_path):
    dataset = Conversations(processor, pictures)
    trainer = trainer_for(model, dataset, tmp_path, steps=12)
    before = trainer.evaluate(dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(dataset)["eval_loss"] < 0.7 * before
    predictions = trainer.predict(dataset)
    logits = predictions.predictions[0] if isinstance(predictions.predictions, tuple) else predictions.predictions
    assert logits.shape[:2] == predictions.label_ids.shape


@both_families
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


# --------------------------------------------------------------------------------------------------- targets that count


def copied_labels(inputs):
    """What public notebooks do: the ids again, padding alone left out, placeholders not."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


class Rows(Dataset):
    """Rows of a processed batch, in a given order."""

    def __init__(self, inputs):
        self.inputs = {**inputs, "labels": copied_labels(inputs)}

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, row):
        return {name: value[row] for name, value in self.inputs.items()}


class Remembering(Trainer):
    """Keeps the gradient of every step."""

    gradient = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradient = self.model.lm_head.weight.grad.clone()
        return loss


def trained_once(model, data, tmp_path, **settings):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        logging_steps=1,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Remembering(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.gradient


@both_families
@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize("steps", [1, 3])
def test_placeholder_labels_that_trainer_counted_do_not_shrink_the_loss(
    model, processor, pictures, tmp_path, budget, steps
):
    model.config.visual_token_budget = budget
    same_number_of_labels = [picture.resize((100, 100)) for picture in pictures]
    inputs = batch_of(processor, same_number_of_labels, [PROMPTS[0]] * 3)
    data = Rows(inputs)
    model.train()
    by_hand = model(**inputs, labels=data.inputs["labels"]).loss
    by_hand.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    size = {"per_device_train_batch_size": 3 // steps, "gradient_accumulation_steps": steps}
    logged, of_trainer = trained_once(model, data, tmp_path, **size)
    assert logged == pytest.approx(by_hand.item(), rel=1e-4)
    torch.testing.assert_close(of_trainer, gradient, rtol=1e-3, atol=1e-5)


@both_families
def test_the_loss_is_the_mean_over_text_targets(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    labels = copied_labels(inputs)
    outputs = model(**inputs, labels=labels)
    is_text = labels.masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)[:, 1:]
    is_text = is_text.masked_fill(inputs["attention_mask"][:, :-1] == 0, -100)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), is_text.flatten())
    torch.testing.assert_close(outputs.loss, expected)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for given in (labels, torch.zeros_like(labels)):  # stock goes by what each position is to predict, too
        torch.testing.assert_close(model(**inputs, labels=given, shift_labels=shifted).loss, expected)
    number = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=number).loss, expected)


@both_families
def test_the_head_runs_over_the_short_prompt_alone(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    logits = model(**inputs, labels=copied_labels(inputs)).logits
    num_tokens = model.recover_tokens(**inputs).selection.num_tokens
    num_placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    length = int((inputs["attention_mask"].sum(1) - num_placeholders + num_tokens).max())
    assert rows == [length] and logits.shape[1] == inputs["input_ids"].shape[1] > length
    assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2 and rows[-1] == 2


# ------------------------------------------------------------------------------------------------ what is never trained


@both_families
def test_what_no_loss_reaches_is_frozen_however_the_model_is_made(model, repo_folder):
    loaded = type(model).from_pretrained(repo_folder)
    for each in (model, loaded, loaded.train()):
        frozen = {name for name, p in each.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _ in each.named_parameters() if "question_tower" in name} | {
            "model.visual_projection.weight"
        }
    assert {name for name, _ in loaded.named_parameters()} <= set(loaded.state_dict())
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in loaded.state_dict().values())


def test_a_wrapper_names_parameters_as_its_state_dict_does(model, processor, pictures):
    wrapper = torch.nn.ModuleDict({"wrapped": model})
    names = {name for name, _ in [*wrapper.named_parameters(), *wrapper.named_buffers()]}
    assert set(wrapper.state_dict()) <= names
    assert {name for name, _ in wrapper.named_parameters()} <= set(wrapper.state_dict())
    assert all(type(name) is str for name in names)
    for name, parameter in wrapper.named_parameters():
        assert wrapper.get_parameter(name) is parameter
    # torch's distributed checkpoints look every parameter up by its name.
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in wrapper.parameters() if p.requires_grad)
    inputs = batch_of(processor, pictures)
    model(**inputs, labels=copied_labels(inputs)).loss.backward()
    optimizer.step()
    weights, moments = get_state_dict(wrapper, optimizer)
    set_state_dict(wrapper, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert set(weights) == set(wrapper.state_dict())


def test_embeddings_are_left_out_of_the_count_of_parameters_as_in_stock(model):
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings


@both_families
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "fc1"], r".*(q_proj|fc1)", "script"])
def test_lora_adapts_only_what_a_loss_reaches(model, processor, pictures, targets):
    if targets == "script":
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [n for n in linear if not any(w in n for w in ("vision_tower", "multi_modal_projector", "lm_head"))]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    inputs = batch_of(processor, pictures)
    adapted.train()
    adapted(**inputs, labels=copied_labels(inputs)).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and not any("question" in name or "visual_projection" in name for name in trained)
    # The tower's layers behind the one that LLaVA reads have no part in stock's loss either.
    unreached = {name for name, p in trained.items() if p.grad is None}
    assert all("vision_tower.encoder.layers.2" in name for name in unreached)
