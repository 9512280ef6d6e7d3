"""How often the host waits for the device: one number per batch in adaptive mode, never with a fixed budget.

On the CPU by structure (every operation that would wait is counted, and the meta device has no values to wait for at
all), on a GPU by CUDA's own check.
"""

import pytest
import torch
from batches import both_families, images_of
from oracles import HostReads

from recoverable_llava.recoverable_model import ImageInputs


BUDGET = 7


@pytest.fixture
def inputs(processor, pictures):
    text = ["USER: <image> and <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nhow many dog ? ASSISTANT:"]
    return processor(images=[pictures[:2], pictures[2:3]], text=text, padding=True, return_tensors="pt")


@pytest.fixture
def short_inputs(processor, pictures):
    processor.visual_token_budget = BUDGET
    text = ["USER: <image>\nwhat ? ASSISTANT:", "USER: <image>\nhow many ? ASSISTANT:"]
    return processor(images=[[pictures[0]], [pictures[1]]], text=text, padding=True, return_tensors="pt")


def sizes_read(inputs):
    """Where tensors have the shapes that the sizes of images make, these are read, once, as in stock."""
    return ["tolist"] if "image_sizes" in inputs else []


QUESTION = ("question_input_ids", "question_attention_mask")


def questions_of(inputs):
    return {name: inputs[name] for name in QUESTION}


def compress(model, inputs, vision, questions):
    images = ImageInputs.of(None, vision)
    settings = model.config.recovery_settings()
    return model.model.compress_prompt(inputs["input_ids"], images, settings, inputs["attention_mask"], **questions)


def test_the_counter_counts():
    values = torch.tensor([1.0, 0.0, 2.0])
    reads = {
        "_local_scalar_dense": lambda: float(values[0]),
        "tolist": lambda: values.tolist(),
        "nonzero": lambda: values.nonzero(),
        "index by a mask": lambda: values[values > 0],
        "masked_select": lambda: values.masked_select(values > 0),
        "repeat_interleave": lambda: values.repeat_interleave(torch.tensor([1, 2, 3])),
        "equal": lambda: torch.equal(values, values),
    }
    for name, read in reads.items():
        with HostReads() as host:
            read()
        assert host.names and host.names[0] == name, (name, host.names)
    with HostReads() as host:
        if (values > 0).any():
            pass
        torch.where(values > 0, values, 0).sort()
        values[torch.tensor([0, 1])].repeat_interleave(2)
    assert host.names == ["_local_scalar_dense"]


# ------------------------------------------------------------------------------------------------------- adaptive mode


@both_families
@pytest.mark.parametrize("has_question", [True, False])
def test_adaptive_compression_reads_once_per_batch(model, inputs, has_question):
    with HostReads() as host:
        vision = model.get_vision_features(**images_of(inputs))
    assert host.names == sizes_read(inputs)
    questions = questions_of(inputs) if has_question else {}
    with HostReads() as host:
        model.model.embed_questions(len(inputs["input_ids"]), **questions)
    assert host.names == []
    with HostReads() as host:
        short, _, _ = compress(model, inputs, vision, questions)
    assert host.names == ["tolist"]
    assert short.input_ids.shape[1] < inputs["input_ids"].shape[1]


@both_families
def test_adaptive_forward_reads_once_more_than_its_language_model(model, inputs):
    model.eval()
    seen = []
    language_model = model.model.language_model
    language_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with HostReads() as host:
        model(**inputs)
    arguments = {name: seen[0][name] for name in ("inputs_embeds", "attention_mask", "position_ids")}
    with HostReads() as of_language_model:
        language_model(**arguments, use_cache=True)
    assert len(host.names) == len(of_language_model.names) + 1 + len(sizes_read(inputs))


# --------------------------------------------------------------------------------------------------------- fixed budget


@both_families
def test_fixed_budget_image_features_read_nothing(model, inputs):
    model.config.visual_token_budget = BUDGET
    questions = {name: inputs[name][[0, 0, 1]] for name in QUESTION}
    with HostReads() as host:
        features = model.get_image_features(**images_of(inputs), **questions).pooler_output
    assert host.names == sizes_read(inputs) and len(features) == 3 and features[0].shape[0] == BUDGET


def on_meta(model, inputs):
    """Tensors without values: any operation that needs one is an error."""
    on_host = ("image_sizes",)
    return model.to("meta"), {name: value if name in on_host else value.to("meta") for name, value in inputs.items()}


@both_families
def test_fixed_budget_needs_no_values(model, short_inputs):
    model.config.visual_token_budget = BUDGET
    model, inputs = on_meta(model, short_inputs)
    with pytest.raises(RuntimeError):
        inputs["input_ids"].sum().item()
    questions = questions_of(inputs)
    features = model.get_image_features(**images_of(inputs), **questions).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(BUDGET, 32)] * 2
    assert model.get_image_features(**images_of(inputs)).pooler_output[0].shape == (BUDGET, 32)
    vision = model.get_vision_features(**images_of(inputs))
    short, embeds, _ = compress(model, inputs, vision, questions)
    assert short.input_ids.shape == inputs["input_ids"].shape and embeds.shape == (*short.input_ids.shape, 32)
    settings, images = model.config.recovery_settings(), ImageInputs.of(**images_of(inputs), vision_features=None)
    _, embeds, _ = model.model.compress_prompt(inputs["input_ids"], images, settings, **questions)
    assert embeds.shape == (*short.input_ids.shape, 32)


@both_families
def test_fixed_budget_of_many_images_needs_no_values(model, processor, pictures):
    """A prompt that is longer than one image's patches, but too short for all of its images'."""
    model.config.visual_token_budget = processor.visual_token_budget = BUDGET
    number = model.config.num_patches // BUDGET + 3
    prompt = f"USER: {'<image>' * number}\nwhy ? ASSISTANT:"
    inputs = processor(images=[(pictures * number)[:number]], text=[prompt], return_tensors="pt")
    assert inputs["input_ids"].shape[1] > model.config.num_patches
    model, inputs = on_meta(model, inputs)
    vision = model.get_vision_features(**images_of(inputs))
    short, _, _ = compress(model, inputs, vision, questions_of(inputs))
    assert short.input_ids.shape == inputs["input_ids"].shape


@both_families
def test_adaptive_mode_needs_a_value(model, inputs):
    """What makes the tests above say something: without a budget there is no way around one number."""
    model, inputs = on_meta(model, inputs)
    vision = model.get_vision_features(**images_of(inputs))
    with pytest.raises((RuntimeError, NotImplementedError)):
        compress(model, inputs, vision, questions_of(inputs))


# -------------------------------------------------------------------------------------------------------------- compile


def with_sizes_on_host(inputs):
    """A graph depends on the sizes, so that they must not be within it."""
    return {name: value.tolist() if name == "image_sizes" else value for name, value in inputs.items()}


@both_families
@pytest.mark.slow
def test_fixed_budget_compiles_in_one_graph(model, short_inputs):
    model.config.visual_token_budget = BUDGET
    model.eval()
    short_inputs = with_sizes_on_host(short_inputs)
    with torch.no_grad():
        expected = model(**short_inputs, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        logits = compiled(**short_inputs, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        # Other values, the same graph.
        pixels = short_inputs["pixel_values"].flip(0)
        ids = short_inputs["question_input_ids"].flip(0)
        others = {**short_inputs, "pixel_values": pixels, "question_input_ids": ids}
        with torch.compiler.set_stance("fail_on_recompile"):
            logits = compiled(**others, use_cache=False).logits
        torch.testing.assert_close(logits, model(**others, use_cache=False).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(logits, expected, atol=1e-3)


@both_families
@pytest.mark.slow
def test_fixed_budget_image_features_compile_in_one_graph(model, short_inputs):
    model.config.visual_token_budget = BUDGET
    model.eval()
    given = {**questions_of(short_inputs), **images_of(with_sizes_on_host(short_inputs))}

    def features(pixel_values):
        return torch.stack(model.model.get_image_features(**{**given, "pixel_values": pixel_values}).pooler_output)

    with torch.no_grad():
        # transformers installs its hooks on the first call, under a lock that cannot be compiled (stock's too).
        expected = features(short_inputs["pixel_values"])
        torch._dynamo.reset()
        compiled = torch.compile(features, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(short_inputs["pixel_values"]), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def sync_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@both_families
@pytest.mark.gpu
def test_fixed_budget_never_waits_on_a_gpu(model, short_inputs, sync_is_an_error):
    torch.cuda.set_sync_debug_mode("default")
    model.config.visual_token_budget = BUDGET
    model = model.to("cuda").eval()
    inputs = {name: value.to("cuda") for name, value in short_inputs.items()}
    questions = questions_of(inputs)
    with torch.no_grad():
        model.get_image_features(**images_of(inputs), **questions)  # first use of the libraries synchronises
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        model.get_image_features(**images_of(inputs), **questions)
        vision = model.get_vision_features(**images_of(inputs))
        compress(model, inputs, vision, questions)


@both_families
@pytest.mark.gpu
def test_adaptive_mode_waits_once_on_a_gpu(model, inputs, sync_is_an_error, monkeypatch):
    torch.cuda.set_sync_debug_mode("default")
    model = model.to("cuda").eval()
    inputs = {name: value.to("cuda") for name, value in inputs.items()}
    questions = questions_of(inputs)
    count, tolist = [], torch.Tensor.tolist

    def the_one_copy(tensor):
        count.append(tensor.numel())
        torch.cuda.set_sync_debug_mode("default")
        values = tolist(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return values

    with torch.no_grad():
        vision = model.get_vision_features(**images_of(inputs))
        compress(model, inputs, vision, questions)
        monkeypatch.setattr(torch.Tensor, "tolist", the_one_copy)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        vision = model.get_vision_features(**images_of(inputs))
        compress(model, inputs, vision, questions)
    assert len(count) == 1
