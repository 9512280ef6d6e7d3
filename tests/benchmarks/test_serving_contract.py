"""What a serving engine relies on, step by step as vLLM's Transformers backend does it, without the engine.

The number of tokens of an image is known from its size before the encoder runs; the processor is called with text of
its own; the question travels with the request; `get_image_features` takes what the processor returned, and exactly the
promised number of rows takes the places of the placeholders.
"""

import inspect

import pytest
import torch


BUDGET = 9


@pytest.fixture
def engine(model, processor):
    model.config.visual_token_budget = processor.visual_token_budget = BUDGET
    return model.eval(), processor


def test_token_counts_come_from_the_processor_alone(engine, pictures):
    _, processor = engine
    sizes = [(picture.height, picture.width) for picture in pictures]
    promised = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert promised == [BUDGET] * len(pictures)
    for picture in pictures:
        dummy = processor(images=picture, text=processor.image_token, return_tensors="pt")
        assert (dummy["input_ids"] == processor.image_token_id).sum() == BUDGET


def test_features_of_a_request_fill_its_placeholders(engine, pictures):
    model, processor = engine
    prompt, question = "USER: <image>\nwhat is it ? ASSISTANT:", "what is it ?"
    # The engine's own call of the processor: dummy text, the question from `mm_processor_kwargs`.
    multimodal = processor(images=pictures[0], text=processor.image_token, questions=[question], return_tensors="pt")
    text = processor(images=pictures[0], text=prompt, return_tensors="pt")
    accepted = inspect.signature(model.model.get_image_features).parameters
    passed = {name: value for name, value in multimodal.items() if name not in ("input_ids", "attention_mask")}
    assert set(passed) <= set(accepted)
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(**passed).pooler_output))
        placeholders = text["input_ids"] == model.config.image_token_id
        assert features.shape == (int(placeholders.sum()), model.config.text_config.hidden_size)
        embeds = model.get_input_embeddings()(text["input_ids"])
        embeds[placeholders] = features
        outputs = model.model.language_model(inputs_embeds=embeds)
        logits = model.lm_head(outputs.last_hidden_state)
        torch.testing.assert_close(logits, model(**text).logits, rtol=0, atol=1e-5)


def test_requests_batched_by_the_engine_keep_their_own_questions(engine, pictures):
    model, processor = engine
    questions = ["what is red ?", "how many dog ?", "where ?"]
    alone = [
        processor(images=picture, text=processor.image_token, questions=[question], return_tensors="pt")
        for picture, question in zip(pictures, questions)
    ]
    names = ("pixel_values", "question_input_ids", "question_attention_mask")
    together = {name: torch.cat([request[name] for request in alone]) for name in names}
    with torch.no_grad():
        batched = model.model.get_image_features(**together).pooler_output
        for request, features in zip(alone, batched):
            single = model.model.get_image_features(**{name: request[name] for name in names}).pooler_output[0]
            torch.testing.assert_close(features, single, rtol=0, atol=1e-5)


def test_static_cache_and_compiled_pieces_answer_as_plain_calls(engine, pictures):
    """The switch of docs/performance.md; the default backend needs a GPU to pay, so structure alone is checked here."""
    model, processor = engine
    prompts = ["USER: <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nwhere ? ASSISTANT:"]
    inputs = processor(images=[[picture] for picture in pictures[:2]], text=prompts, padding=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    torch._dynamo.reset()
    model.model.get_image_features = torch.compile(model.model.get_image_features, fullgraph=True, backend="eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for _ in range(2):
        found = model.generate(**inputs, max_new_tokens=5, do_sample=False, cache_implementation="static")
        assert torch.equal(found, expected)
