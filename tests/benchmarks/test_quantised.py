"""Quantised loading, where the packages are installed: the language model shrinks, the towers choose as before.

`llm_int8_skip_modules` (bitsandbytes) and `modules_to_not_convert` (torchao) keep both towers and the projection of the
patches as they are: they are 2 % of the weights of a 7B model, and they decide which tokens stay.
"""

import logging

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from benchmarks.models import SHAPES, build, make_inputs
from recoverable_llava import RecoverableLlavaForConditionalGeneration
from recoverable_llava.recoverable_vision import FrozenLinear


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOWERS = [
    "model.vision_tower",
    "model.question_tower",
    "model.visual_projection",
    "model.multi_modal_projector",
    "lm_head",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    config = build(SHAPES["tiny"], torch.device("cpu"), torch.float32).ours.config
    torch.manual_seed(0)
    RecoverableLlavaForConditionalGeneration(config).save_pretrained(path)
    return str(path)


def bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(llm_int8_skip_modules=TOWERS, **settings)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=TOWERS)


CONFIGS = {
    "bitsandbytes, 8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao, 8 bits": torchao,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_language_model_gets_the_same_tokens(folder, name):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    quantization_config = CONFIGS[name]()
    load = RecoverableLlavaForConditionalGeneration.from_pretrained
    plain = load(folder, device_map=DEVICE)
    quantised = load(folder, quantization_config=quantization_config, device_map=DEVICE)
    layer = quantised.model.language_model.layers[0].mlp.up_proj
    assert type(layer.weight.data) is not type(plain.lm_head.weight.data) or layer.weight.dtype != torch.float32
    assert isinstance(quantised.model.question_tower.text_projection, FrozenLinear)
    for budget in (None, 16):
        placeholders = budget or SHAPES["tiny"].num_patches
        inputs = make_inputs(SHAPES["tiny"], 2, placeholders, torch.device(DEVICE), torch.float32)
        plain.config.visual_token_budget = quantised.config.visual_token_budget = budget
        with torch.no_grad():
            chosen, expected = quantised.recover_tokens(**inputs), plain.recover_tokens(**inputs)
            assert torch.equal(chosen.assembly.token_index, expected.assembly.token_index)
            logits, reference = quantised(**inputs).logits, plain(**inputs).logits
        assert torch.nn.functional.cosine_similarity(logits.flatten(), reference.flatten(), dim=0) > 0.9
        answer = quantised.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape == (2, inputs["input_ids"].shape[1] + 3)
