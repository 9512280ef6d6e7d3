"""Whoever swaps stock LLaVA for ours reads no warning that stock would not give: neither Python's nor in a log."""

import logging
import warnings

import pytest
import torch
from batches import GREEDY, batch_of, both_families
from tiny import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

import recoverable_llava  # noqa: F401  (registers its classes)


def forward(model, inputs, folder):
    model(**inputs, output_hidden_states=True)


def generate(model, inputs, folder):
    model.generate(**inputs, **GREEDY)


def sample(model, inputs, folder):
    model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)


def second_turn(model, inputs, folder):
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, first.sequences[:, -1:]], dim=1)
    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, past_key_values=first.past_key_values)


def static_cache(model, inputs, folder):
    model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)


def training_step(model, inputs, folder):
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def checkpointed_training_step(model, inputs, folder):
    model.gradient_checkpointing_enable()
    training_step(model, inputs, folder)


def save_and_load(model, inputs, folder):
    model.save_pretrained(folder)
    type(model).from_pretrained(folder)


CALLS = [forward, generate, sample, second_turn, static_cache, training_step, checkpointed_training_step, save_and_load]


class Messages(logging.Handler):
    """What is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = set()

    def emit(self, record):
        self.texts.add(record.getMessage())


def told(call, model, inputs, folder):
    """Every warning and message of one call, with our names replaced by stock's."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.info_once.cache_clear()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    loggers, handler = [logging.getLogger(name) for name in ("transformers", "torch")], Messages()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            call(model, inputs, folder)
        finally:
            transformers_logging.set_verbosity(verbosity)
            for logger in loggers:
                logger.removeHandler(handler)
    texts = handler.texts | {f"{warning.category.__name__}: {warning.message}" for warning in caught}
    return {text.replace("RecoverableLlava", "Llava").replace("recoverable_llava", "llava") for text in texts}


@pytest.fixture
def one_row(pictures):
    return {"pictures": pictures, "prompts": ["USER: <image>\nwhat is the colour of the cat ? ASSISTANT:"]}


@both_families
@pytest.mark.parametrize("compress", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("call", CALLS, ids=[call.__name__ for call in CALLS])
def test_no_warning_that_stock_does_not_give(call, compress, family, llava_folder, repo_folder, one_row, tmp_path):
    stock = FAMILIES[family][1].from_pretrained(llava_folder)
    ours = AutoModelForImageTextToText.from_pretrained(repo_folder)
    ours.config.compress = compress
    stock_inputs = batch_of(FAMILIES[family][2].from_pretrained(llava_folder), **one_row)
    our_inputs = batch_of(AutoProcessor.from_pretrained(repo_folder), **one_row)
    by_stock = told(call, stock, stock_inputs, tmp_path / "stock")
    by_ours = told(call, ours, our_inputs, tmp_path / "ours")
    assert by_ours <= by_stock


def test_what_is_told_is_heard(llava_folder, tmp_path):
    """The check above is not deaf."""

    def call(*_):
        transformers_logging.get_logger("transformers.models.llava").warning_once("RecoverableLlavaModel says so")
        warnings.warn("or so", FutureWarning, stacklevel=1)

    for _ in range(2):
        assert told(call, None, None, tmp_path) == {"LlavaModel says so", "FutureWarning: or so"}


def test_a_newer_transformers_is_said_to_be_untested_once(monkeypatch, caplog):
    import transformers
    from transformers.utils import logging

    from recoverable_llava import transformers_names

    logging.get_logger("transformers").propagate = True
    transformers_names.logger.warning_once.cache_clear()
    monkeypatch.setattr(transformers, "__version__", "5.23.1")
    transformers_names.warn_if_untested()
    assert not caplog.records
    monkeypatch.setattr(transformers, "__version__", "6.0.0.dev0")
    transformers_names.warn_if_untested()
    transformers_names.warn_if_untested()
    assert [("tested with transformers up to" in record.message) for record in caplog.records] == [True]
