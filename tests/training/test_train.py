"""The training loop in miniature: it resumes exactly, learns, exports to stock folders that load completely."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from training.data import BatchMaker
from training.evaluate import answer_accuracy, evaluate, retrieval
from training.examples import scene_examples
from training.export import clip_model, export_combined, export_stock, load_weights
from training.model import SMOKE_SIZE, TrainingModel, visual_positions
from training.optimizer import orthogonal
from training.render import renderer_constants
from training.train import TrainingOptions, train


OPTIONS = {"smoke": True, "batch_size": 4, "workers": 0, "warmup": 2, "log_every": 2, "steps": 4, "validate_every": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(TrainingOptions(folder=str(folder), **OPTIONS)), folder


def test_loss_falls_and_the_log_tells(run):
    rows = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    measured = [row["answers"] for row in rows if "answers" in row]
    assert measured[-1] < measured[0]
    assert any("validation" in row for row in rows)


def test_resuming_gives_the_same_weights(run, tmp_path):
    train(TrainingOptions(folder=str(tmp_path), stop_at_step=2, **OPTIONS))
    resumed = train(TrainingOptions(folder=str(tmp_path), **OPTIONS))
    for name, value in run[0].state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name, rtol=0, atol=0)


def test_budget_must_be_given_once():
    with pytest.raises(ValueError, match="exactly one"):
        train(TrainingOptions(folder="/tmp/unused", smoke=True))


def test_training_pass_equals_the_stock_forward():
    """What is trained is what the stock classes compute: answers' logits and CLIP's embeddings."""
    torch.manual_seed(0)
    model = TrainingModel(SMOKE_SIZE).eval()
    maker = BatchMaker("test")
    batch = maker([5]) | {"prefix": torch.tensor([maker.prefix])}
    constants = renderer_constants()
    with torch.no_grad():
        pixels = (model.render(batch, constants) - model.mean) / model.std
        features, image_embedding = model.vision(pixels * model.std + model.mean)
        patches = features.shape[1]
        tokens = model.llava.model.multi_modal_projector(features)
        embed = model.llava.model.language_model.embed_tokens
        inputs = torch.cat([embed(batch["prefix"]), tokens, embed(batch["text"])], 1)
        positions = torch.arange(inputs.shape[1])[None].float()
        ours = model.llava.lm_head(model.language(inputs, positions))
        ids = torch.cat(
            [batch["prefix"], torch.full((1, patches), model.llava.config.image_token_id), batch["text"]], 1
        )
        stock = model.llava(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        clip = clip_model(model)
        captions = batch["captions"][:, 0]
        expected = clip(input_ids=captions, attention_mask=torch.ones_like(captions), pixel_values=pixels)
        ours = torch.nn.functional.normalize(model.texts(captions), dim=-1)
        torch.testing.assert_close(ours, expected.text_embeds, rtol=1e-4, atol=1e-4)
        ours = torch.nn.functional.normalize(image_embedding, dim=-1)
        torch.testing.assert_close(ours, expected.image_embeds, rtol=1e-4, atol=1e-4)


def test_positions_keep_every_visual_token():
    torch.manual_seed(0)
    positions = visual_positions(64, 36, 3, 10, "cpu")
    assert positions.shape == (64, 49)
    assert (positions[:, :3] == torch.arange(3)).all()
    torch.testing.assert_close(positions[:, 39:].diff(dim=1), torch.ones(64, 9), rtol=0, atol=1e-3)
    visual = positions[:, 3:39]
    assert (visual.amax(1) < positions[:, 39]).all() and (visual.sort(1).values.diff(dim=1) > 0).all()
    assert (visual == torch.arange(3, 39)).all(1).float().mean() > 0.3


def test_orthogonal_update():
    torch.manual_seed(0)
    update = orthogonal(torch.randn(3, 20, 8))
    values = torch.linalg.svdvals(update)
    assert update.shape == (3, 20, 8) and values.min() > 0.5 and values.max() < 1.4


def test_export_loads_completely_and_answers(run, tmp_path):
    llava, clip = export_stock(load_weights(run[1], smoke=True), tmp_path)
    for model_class, folder in ((LlavaForConditionalGeneration, llava), (CLIPModel, clip)):
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(llava)
    example = next(scene_examples("test", 1))
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    assert prompt == f"USER: <image>\n{example.question} ASSISTANT:"
    maker = BatchMaker("test")
    ids = processor(images=example.image(), text=prompt)["input_ids"][0]
    assert list(ids[:3]) == maker.prefix
    assert list(ids[3 + 36 :]) == maker.language(example.question + " ASSISTANT:")
    accuracy = answer_accuracy(str(llava), "test", 2, kinds=("existence",), batch_size=2)
    assert set(accuracy) == {"existence"} and 0 <= accuracy["existence"]["accuracy"] <= 1


def test_a_checkpoint_comes_apart_into_the_stock_halves_it_was_made_of(run, tmp_path):
    halves = export_stock(load_weights(run[1], smoke=True), tmp_path / "trained")
    export_combined(*halves, tmp_path / "combined")
    again = export_stock(load_weights(tmp_path / "combined", smoke=True), tmp_path / "again")
    for trained, parted in zip(halves, again, strict=True):
        expected, found = load_file(trained / "model.safetensors"), load_file(parted / "model.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected if name != "logit_scale")


def test_retrieval_counts_fitting_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.evaluate.RETRIEVAL_BATCH", 8)
    _, clip = export_stock(load_weights(run[1], smoke=True), tmp_path)
    assert 0 <= retrieval(str(clip), "test", 1) <= 1


def test_parts_measured_alone_leave_the_others(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"retrieval_top1": 0.9, "retrieval_captions": 256, "combination": {}}))
    monkeypatch.setattr("training.evaluate.answer_accuracy", lambda folder, split, count, **settings: {split: count})
    found = evaluate("llava", "clip", str(figures), count=8, parts=["combination"])
    assert found == {"retrieval_top1": 0.9, "retrieval_captions": 256, "combination": {"combination": 2}}
    assert json.loads(figures.read_text()) == found
