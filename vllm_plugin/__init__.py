"""vLLM plugin: serves a repo with its compression. vLLM finds it through the entry point `vllm.general_plugins`.

What lies where, in the order in which a request passes:

    processing.py       placeholders and inputs of the towers; the question joins the identity of each image
    model.py            the towers, the recovery and vLLM's own language model
    vision_features.py  what the tower said, kept by image so that more questions cost no more passes
    image_embeds.py     for clients: adaptive numbers of tokens, recovered outside the engine
    cpu_server.yaml     flags of a small server on a CPU
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
