"""Answers of the engine are those of transformers at the same budget: the same tokens, log-probabilities within 1e-5.

Log-probabilities tell what answers alone hide: with another question's visual tokens most answers stay right.
"""

from pathlib import Path

import pytest
from cachetools import LRUCache
from PIL import Image
from reference import MAX_TOKENS, REPO, Generated, Reference, user_prompt
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from demo.scene import ANSWERS, PICTURE
from training.examples import scene_examples
from vllm_plugin.image_embeds import ImageEmbedder
from vllm_plugin.vision_features import num_bytes


TOLERANCE = 1e-5
BUDGETS = (16, 33, 58, 64)
NUM_QUESTIONS = 104
NO_IMAGE = "USER: What color is the sky? ASSISTANT:"


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module")
def engine():
    return LLM(
        REPO,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=256 * 2**20,
        block_size=32,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 3},
        enable_mm_embeds=True,
    )


@pytest.fixture
def tower_calls(engine):
    """How many images each pass of the vision tower took since the test began."""
    calls = []

    def count(model):
        run = model.vision.get_vision_features
        model.vision.get_vision_features = lambda images: calls.append(len(images)) or run(images)

    engine.apply_model(count)
    yield calls
    engine.apply_model(lambda model: delattr(model.vision, "get_vision_features"))


def forget(engine):
    """Empty every cache: of prefixes, of processed and encoded images, of vision features."""
    engine.reset_prefix_cache()
    engine.reset_mm_cache()
    engine.llm_engine.reset_encoder_cache()
    engine.apply_model(lambda model: model.vision_features_cache.clear())


def request(prompt, images=(), **options):
    result = {"prompt": prompt, "mm_processor_kwargs": options}
    if images:
        result["multi_modal_data"] = {"image": list(images)}
    return result


def generate(engine, requests):
    outputs = engine.generate(
        requests, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0), use_tqdm=False
    )
    return [
        Generated(
            list(output.outputs[0].token_ids),
            [chosen[token].logprob for token, chosen in zip(output.outputs[0].token_ids, output.outputs[0].logprobs)],
        )
        for output in outputs
    ]


def largest_difference(got, expected):
    return max(one.difference(two) for one, two in zip(got, expected, strict=True))


@pytest.fixture(scope="module")
def scenes():
    """Pictures, a question about each, and the answer."""
    return [(example.image(), example.question, example.answer) for example in scene_examples("test", NUM_QUESTIONS)]


def test_every_budget_answers_as_transformers_does(engine, reference, scenes):
    """All budgets in one batch, so every step mixes them."""
    cases = [(image, question, budget) for image, question, _ in scenes for budget in BUDGETS]
    expected = [reference(user_prompt(question), [image], budget) for image, question, budget in cases]
    got = generate(
        engine,
        [request(user_prompt(question), [image], visual_token_budget=budget) for image, question, budget in cases],
    )
    for index, budget in enumerate(BUDGETS):
        assert largest_difference(got[index :: len(BUDGETS)], expected[index :: len(BUDGETS)]) < TOLERANCE, budget


def test_the_budget_is_the_number_of_placeholders(engine, scenes):
    image, question, _ = scenes[0]
    token = engine.get_tokenizer().convert_tokens_to_ids("<image>")
    requests = [request(user_prompt(question), [image], visual_token_budget=budget) for budget in BUDGETS]
    outputs = engine.generate([request(user_prompt(question), [image]), *requests], use_tqdm=False)
    assert [output.prompt_token_ids.count(token) for output in outputs] == [64, *BUDGETS]


def test_no_image_several_images_and_turns_in_one_batch(engine, reference, scenes):
    (one, first, answer), (two, second, _), (three, third, _) = scenes[:3]
    turns = user_prompt(first) + f" {answer}</s>USER: {second} ASSISTANT:"
    cases = [
        (NO_IMAGE, [], 33),
        (user_prompt(first, 2), [one, two], 58),
        (user_prompt(second, 2), [two, two], 16),  # one image twice
        (user_prompt(third, 3), [three, one, two], 33),
        (turns, [one], 58),  # the second question guides, not the first
        (user_prompt(""), [one], 16),  # no question
    ]
    expected = [reference(*case) for case in cases]
    forget(engine)
    got = generate(engine, [request(prompt, images, visual_token_budget=n) for prompt, images, n in cases])
    assert largest_difference(got, expected) < TOLERANCE


def test_many_questions_about_one_image_run_the_tower_once(engine, reference, scenes, tower_calls):
    image = Image.open(PICTURE)
    questions = [*ANSWERS, *dict.fromkeys(question for _, question, _ in scenes)][:60]
    expected = [reference(user_prompt(question), [image], 58) for question in questions]
    assert largest_difference(expected[:-1], expected[1:]) > 1e-3  # so a mix-up would show
    requests = [request(user_prompt(question), [image], visual_token_budget=58) for question in questions]
    forget(engine)
    assert largest_difference(generate(engine, requests), expected) < TOLERANCE
    assert tower_calls == [1]
    # And again, with every cache full, in another order.
    assert largest_difference(generate(engine, requests[::-1])[::-1], expected) < TOLERANCE
    assert tower_calls == [1]


def test_features_that_do_not_fit_are_computed_again(engine, reference, scenes, tower_calls):
    cases = [(image, question) for image, question, _ in scenes[:3]]
    expected = [reference(user_prompt(question), [image], 33) for image, question in cases]
    requests = [request(user_prompt(question), [image], visual_token_budget=33) for image, question in cases]
    cache = engine.apply_model(lambda model: model.vision_features_cache)[0]
    for_one, for_none = (LRUCache(size, getsizeof=num_bytes) for size in (4 * 10**6, 10**6))
    try:
        for small, kept in ((for_one, 1), (for_none, 0)):
            forget(engine)
            engine.apply_model(lambda model, small=small: setattr(model, "vision_features_cache", small))
            assert largest_difference(generate(engine, requests), expected) < TOLERANCE
            assert len(small) == kept
    finally:
        engine.apply_model(lambda model: setattr(model, "vision_features_cache", cache))
    assert sum(tower_calls) == 6


def test_adaptive_counts_through_image_embeds(engine, reference, scenes):
    embedder = ImageEmbedder(REPO, dtype="float32")
    cases = [(image, question) for image, question, _ in scenes[:8]]
    expected = [reference(user_prompt(question), [image], None) for image, question in cases]
    embeds = [embedder(image, question) for image, question in cases]
    assert len({len(tokens) for tokens in embeds}) > 1
    got = generate(engine, [request(user_prompt(question), [tokens]) for (_, question), tokens in zip(cases, embeds)])
    assert largest_difference(got, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_token_budget": 0}, "from 1 to 576, got 0"),
        ({"visual_token_budget": 577}, "from 1 to 576, got 577"),
        ({"visual_token_budget": "58"}, "got '58'"),
        ({"visual_token_budget": True}, "got True"),
        ({"visual_tokens": 58}, "no option 'visual_tokens'"),
        ({"question": "What is this?"}, "no option 'question'"),
        ({"images_kwargs": {"do_center_crop": False}}, r"images of shape \(3, 400, 336\)"),
    ],
)
def test_impossible_options_are_refused_and_nothing_else_changes(engine, reference, scenes, options, message):
    image, question, _ = scenes[0]
    tall = image.resize((336, 400))
    with pytest.raises(VLLMValidationError, match=message):
        engine.generate([request(user_prompt(question), [tall], **options)], use_tqdm=False)
    got = generate(engine, [request(user_prompt(question), [image])])
    assert largest_difference(got, [reference(user_prompt(question), [image], 64)]) < TOLERANCE


def test_an_image_much_longer_than_wide_is_refused(engine):
    with pytest.raises(VLLMValidationError, match="5000 x 1 pixels"):
        engine.generate([request(user_prompt("What is this?"), [Image.new("RGB", (5000, 1))])], use_tqdm=False)


@pytest.mark.parametrize("layout", ["as saved", "current", "nested tower"])
def test_weights_of_every_layout_load(engine, layout):
    """The names that transformers gave to weights over time; all of them arrive."""
    from safetensors.torch import load_file

    weights = {}
    for file in Path(REPO).glob("*.safetensors"):
        weights |= load_file(file)
    prefixes = {
        "as saved": {},
        "current": {"language_model.model": "model.language_model", "vision_tower": "model.vision_tower"},
        "nested tower": {"vision_tower": "model.vision_tower.vision_model"},
    }[layout]
    for old, new in prefixes.items():
        weights = {new + name[len(old) :] if name.startswith(old) else name: each for name, each in weights.items()}

    language = {name: each for name, each in weights.items() if "language_model" in name}

    def load(model):
        before = {name: weight.clone() for name, weight in model.vision.state_dict().items()}
        for parameter in model.vision.parameters():
            parameter.data.zero_()
        # vLLM repacks the language model's weights once they are loaded, so here their names have to do.
        loaded = model.load_weights([weight for weight in weights.items() if weight[0] not in language])
        missing = {f"vision.{name}" for name, _ in model.vision.named_parameters()} - loaded
        after = model.vision.state_dict()
        return missing, [name for name, weight in before.items() if not weight.equal(after[name])]

    missing, changed = engine.apply_model(load)[0]
    assert not missing and not changed
    mapper = engine.apply_model(lambda model: model.hf_to_vllm_mapper)[0]
    assert {mapper.map_name(name).split(".layers.")[0] for name in language} == {
        "language_model.model",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
    }


@pytest.mark.parametrize("num_placeholders", [0, 2])
def test_placeholders_must_match_the_images(engine, scenes, num_placeholders):
    image, question, _ = scenes[0]
    with pytest.raises(VLLMValidationError, match=f"{num_placeholders} image placeholders for 1 images"):
        engine.generate([request(user_prompt(question, num_placeholders), [image])], use_tqdm=False)
