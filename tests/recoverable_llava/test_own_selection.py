"""A selection of one's own: `select` and `assemble` are overridden in a subclass, and everything else goes on."""

from dataclasses import replace

import pytest
import torch
from batches import GREEDY, batch_of
from tiny import NUM_PATCHES

from recoverable_llava import RecoverableLlavaForConditionalGeneration, RecoverableLlavaModel
from recoverable_llava.selection import Selection


class LastPatchesModel(RecoverableLlavaModel):
    """Keeps the last three patches, and nothing for the rest."""

    def select(self, images, settings):
        chosen = torch.zeros_like(images.vision.visual_scores, dtype=torch.bool)
        chosen[:, -3:] = True
        return Selection(chosen, torch.zeros_like(chosen), None, torch.zeros_like(chosen[:, 0]))


class LastPatches(RecoverableLlavaForConditionalGeneration):
    model_class = LastPatchesModel


class DoubledMeansModel(RecoverableLlavaModel):
    """Merged tokens twice as large."""

    def assemble(self, *args, **kwargs):
        assembly = super().assemble(*args, **kwargs)
        return replace(assembly, merge_weights=2 * assembly.merge_weights)


class DoubledMeans(RecoverableLlavaForConditionalGeneration):
    model_class = DoubledMeansModel


def load(model_class, folder):
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture
def own(repo_folder):
    return load(LastPatches, repo_folder)


@torch.no_grad()
def test_a_subclass_loads_the_weights_and_chooses_in_its_own_way(own, repo_folder, processor, pictures):
    standard = load(RecoverableLlavaForConditionalGeneration, repo_folder)
    assert type(own.model) is LastPatchesModel and type(standard.model) is RecoverableLlavaModel
    weights = standard.state_dict()
    assert own.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in own.state_dict().items())

    inputs = batch_of(processor, pictures)
    recovery = own.recover_tokens(**inputs)
    assert recovery.assembly.token_index.tolist() == [list(range(NUM_PATCHES - 3, NUM_PATCHES))] * 3
    assert not torch.allclose(own(**inputs).logits[:, -1], standard(**inputs).logits[:, -1])


@torch.no_grad()
def test_forward_and_generate_run_on_its_choice(own, stock, processor, pictures):
    """As stock with the features of those patches, in a prompt of three placeholders."""
    inputs = batch_of(processor, pictures)
    for row in range(3):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        is_image = ids == own.config.image_token_id
        ids = ids[~is_image | (is_image.cumsum(0) <= 3)]
        embeds = stock.get_input_embeddings()(ids)
        features = stock.get_image_features(inputs["pixel_values"][row : row + 1]).pooler_output[0]
        embeds[ids == own.config.image_token_id] = features[-3:]
        expected = stock(inputs_embeds=embeds[None]).logits[0, -1]
        torch.testing.assert_close(own(**inputs).logits[row, -1], expected, atol=1e-4, rtol=0)
    cache = own(**inputs).past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] - NUM_PATCHES + 3
    first = own.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1]]
    assert torch.equal(first, own(**inputs).logits[:, -1].argmax(-1))


@torch.no_grad()
def test_so_do_prompts_that_are_short_already(own, processor, pictures):
    expected = own(**batch_of(processor, pictures)).logits[:, -1]
    own.config.visual_token_budget = processor.visual_token_budget = 3
    short = batch_of(processor, pictures)
    assert (short["input_ids"] == own.config.image_token_id).sum(1).tolist() == [3, 3, 3]
    torch.testing.assert_close(own(**short).logits[:, -1], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_assembly_of_ones_own(repo_folder, processor, pictures):
    own, standard = load(DoubledMeans, repo_folder), load(RecoverableLlavaForConditionalGeneration, repo_folder)
    inputs = batch_of(processor, pictures)
    ours, theirs = own.recover_tokens(**inputs), standard.recover_tokens(**inputs)
    assert torch.equal(ours.selection.chosen, theirs.selection.chosen)
    assert torch.equal(ours.assembly.merge_weights, 2 * theirs.assembly.merge_weights)
    assert not torch.allclose(own(**inputs).logits[:, -1], standard(**inputs).logits[:, -1])


def test_saving_and_loading_a_subclass(own, tmp_path, processor, pictures):
    own.save_pretrained(tmp_path)
    again = load(LastPatches, tmp_path)
    inputs = batch_of(processor, pictures)
    assert torch.equal(again(**inputs).logits, own(**inputs).logits)
