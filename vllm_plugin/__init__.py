"""vLLM plugin: serves a recoverable-llava repo with its compression, found through the entry point `vllm.general_plugins`.

__init__.py               what vLLM calls at its start: names each architecture and the class that runs it
processing.py             a request becomes placeholders and inputs of the towers; the question joins the identity
model.py                  the towers, the recovery and vLLM's own language model
vision_features_cache.py  what the vision tower made of the last images, so that more questions cost no more passes
image_embeds.py           for clients: adaptive numbers of tokens, recovered outside the engine
"""

# Architecture in config.json -> the class that runs it. vLLM imports a class where a model needs it.
ARCHITECTURES = {
    "RecoverableLlavaForConditionalGeneration": "vllm_plugin.model:RecoverableLlavaForConditionalGeneration",
}


def register() -> None:
    """Make the configuration, the processor and the architectures known; vLLM calls this once in each process."""
    from vllm import ModelRegistry

    import recoverable_llava  # noqa: F401  registers with transformers' Auto classes

    for architecture, model_class in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model_class)
