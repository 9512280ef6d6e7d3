"""The LLaVA-NeXT's training pass is the stock forward; it starts from a LLaVA-1.5, resumes, exports and comes apart."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel, LlavaNextForConditionalGeneration

from training.data import BatchMaker, TiledBatchMaker
from training.evaluate import answer_accuracy, retrieval
from training.examples import tiled_examples
from training.export import clip_model, export_combined, export_stock
from training.model import SMOKE_SIZE, TrainingModel
from training.render import renderer_constants
from training.tiled_model import TiledTrainingModel, recounted_positions, view_facts
from training.tiles import picture_views, tiling
from training.train import TrainingOptions, train
from training.weights import load_weights, save_weights


OPTIONS = {
    "family": "next", "smoke": True, "batch_size": 10, "workers": 0, "warmup": 2, "log_every": 2, "steps": 4,
    "validate_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_weights(TrainingModel(SMOKE_SIZE), folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(TrainingOptions(folder=str(folder), base=str(base), **OPTIONS)), folder


def _model(base):
    model = TiledTrainingModel(SMOKE_SIZE)
    model.start_from(load_weights(base, smoke=True))
    return model.eval()


def _batch(views, first=0):
    maker = TiledBatchMaker("test")
    return maker(list(range(first, first + views))) | {"prefix": torch.tensor([maker.prefix])}


def test_it_starts_from_a_llava(base):
    model, trained = _model(base), load_weights(base, smoke=True)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.state_dict().items())
    assert not model.llava.model.image_newline.any()
    with pytest.raises(ValueError, match="base=None"):
        train(TrainingOptions(folder="/tmp/unused", **OPTIONS))
    with pytest.raises(ValueError, match="from scratch"):
        train(TrainingOptions(folder="/tmp/unused", base=str(base), **OPTIONS | {"family": "llava"}))
    with pytest.raises(ValueError, match="family='nxt'"):
        train(TrainingOptions(folder="/tmp/unused", base=str(base), **OPTIONS | {"family": "nxt"}))


def test_clips_half_stays_and_the_rest_learns(run, base):
    before, after = load_weights(base, smoke=True).state_dict(), run[0].state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in kept} == {"question_tower", "visual_projection"}
    assert all(name in kept for name in before if name.startswith(("question_tower", "visual_projection")))
    assert after["llava.model.image_newline"].any()
    rows = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    measured = [row["answers"] + row["dense"] for row in rows if "answers" in row]
    assert measured[-1] < measured[0]
    assert any("tile_class" in row.get("validation", {}) for row in rows)


def test_resuming_gives_the_same_weights(run, base, tmp_path):
    train(TrainingOptions(folder=str(tmp_path), base=str(base), stop_at_step=2, **OPTIONS))
    resumed = train(TrainingOptions(folder=str(tmp_path), base=str(base), **OPTIONS))
    for name, value in run[0].state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name, rtol=0, atol=0)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_training_pass_equals_the_stock_forward(base, first):
    """What is trained is what the stock classes compute, in every layout of tiles."""
    model = _model(base)
    torch.nn.init.normal_(model.llava.model.image_newline)
    batch, constants = _batch(6, first), renderer_constants()
    seen = tiling(*batch["picture_size"])
    with torch.no_grad():
        views = picture_views(model.render(batch, constants, *seen.canvas), seen)
        features, embeddings = model.vision(views.flatten(0, 1))
        tokens = model.pack(model.llava.model.multi_modal_projector(features).unflatten(0, views.shape[:2]), seen)
        embed = model.llava.model.language_model.embed_tokens
        inputs = torch.cat([embed(batch["prefix"]).expand(len(views), -1, -1), tokens, embed(batch["text"])], 1)
        positions = torch.arange(inputs.shape[1])[None].float().expand(len(views), -1)
        ours = model.llava.lm_head(model.language(inputs, positions))
        image = torch.full((1, tokens.shape[1]), model.llava.config.image_token_id)
        ids = torch.cat([torch.cat([batch["prefix"], image], 1).expand(len(views), -1), batch["text"]], 1)
        pixels = (views - model.mean) / model.std
        sizes = torch.tensor([seen.picture] * len(views))
        stock = model.llava(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_sizes=sizes
        ).logits
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        image_embeddings = clip_model(model).get_image_features(pixel_values=pixels.flatten(0, 1))
        expected = getattr(image_embeddings, "pooler_output", image_embeddings)
        torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)


def test_positions_keep_every_visual_token_and_the_base_view_first():
    torch.manual_seed(0)
    newline = torch.arange(90) % 9 == 8
    newline[:36] = False
    positions = recounted_positions(200, 36, newline, 3, 10)
    assert positions.shape == (200, 103)
    assert (positions[:, :3] == torch.arange(3)).all()
    torch.testing.assert_close(positions[:, 93:].diff(dim=1), torch.ones(200, 9), rtol=0, atol=1e-3)
    visual = positions[:, 3:93]
    assert (visual >= 3 - 1e-4).all() and (visual.amax(1) <= positions[:, 93] + 1e-4).all()
    assert (visual[:, :36].amax(1) <= visual[:, 36:].amin(1) + 1e-4).all()
    usual = (visual == torch.arange(3, 93)).all(1).float().mean()
    ordered = (visual.diff(dim=1) >= -1e-4).all(1).float().mean()
    assert 0.3 < usual < 0.5 and 0.7 < ordered < 0.9


def test_facts_of_views():
    """The base view shows what the scene has, a tile what has its middle there."""
    for first in range(0, 50, 10):
        batch = _batch(6, first)
        seen = tiling(*batch["picture_size"])
        facts = view_facts(batch["objects"], torch.tensor(seen.windows)).unflatten(0, (-1, seen.views))
        assert torch.equal(facts[:, 0], batch["scene_facts"])
        classes = facts[..., :64]
        assert torch.equal(classes[:, 1:].any(1), classes[:, 0])
        if batch["objects"][0, :, 0].ge(0).sum() > 4:
            assert not classes[0, 1:].all(0).equal(classes[0, 0])


def test_export_loads_completely_and_answers(run, tmp_path, monkeypatch):
    llava, clip = export_stock(load_weights(run[1], smoke=True), tmp_path)
    for model_class, folder in ((LlavaNextForConditionalGeneration, llava), (CLIPModel, clip)):
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(llava)
    assert processor.tokenizer.model_max_length == 4096
    model = load_weights(run[1], smoke=True)
    maker = BatchMaker("test")
    for example in tiled_examples("test", 3):
        prompt = f"USER: <image>\n{example.question} ASSISTANT:"
        ids = processor(images=example.image(), text=prompt)["input_ids"][0]
        visual = len(model.layout(tiling(*example.picture_size)))
        assert list(ids[:3]) == maker.prefix
        assert list(ids[3 + visual :]) == maker.language(example.question + " ASSISTANT:")
    accuracy = answer_accuracy(str(llava), "test", 2, kinds=("existence",))
    assert set(accuracy) == {"existence"} and 0 <= accuracy["existence"]["accuracy"] <= 1
    monkeypatch.setattr("training.evaluate.RETRIEVAL_BATCH", 8)
    assert 0 <= retrieval(str(clip), "test", 1, tiled=True) <= 1


def test_a_checkpoint_comes_apart_into_the_stock_halves_that_it_was_made_of(run, tmp_path):
    halves = export_stock(load_weights(run[1], smoke=True), tmp_path / "trained")
    export_combined(*halves, tmp_path / "combined")
    again = export_stock(load_weights(tmp_path / "combined", smoke=True), tmp_path / "again")
    for trained, parted in zip(halves, again, strict=True):
        expected, found = (load_file(folder / "model.safetensors") for folder in (trained, parted))
        assert expected.keys() == found.keys()
        # CLIP's temperature is no part of the combined checkpoint.
        assert all(torch.equal(expected[name], found[name]) for name in expected if name != "logit_scale")
