"""vLLM plugin: serves a repo with its compression. vLLM finds it through the entry point `vllm.general_plugins`.

What lies where, in the order in which a request passes:

    processing.py       placeholders and inputs of the towers; the question joins the identity of each image
    model.py            the towers, the recovery and vLLM's own language model
    vision_features.py  what the tower said, kept by image so that more questions cost no more passes
    image_embeds.py     for clients: adaptive numbers of tokens, recovered outside the engine
    cpu_server.yaml     flags of a small server on a CPU
"""

from typing import Any


# Architecture in config.json -> the class that runs it. vLLM imports a class where a model needs it.
# LLaVA-NeXT is known so that it can be refused: unknown, it would fall to vLLM's Transformers backend, which does not
# compress as this model does.
ARCHITECTURES = dict.fromkeys(
    ("RecoverableLlavaForConditionalGeneration", "RecoverableLlavaNextForConditionalGeneration"),
    "vllm_plugin.model:RecoverableLlavaForConditionalGeneration",
)


def check_family(config: Any) -> None:
    """Raise a ValueError unless this plugin runs the family of a repo's configuration."""
    if config.model_type != "recoverable_llava":
        raise ValueError(
            f"This vLLM plugin serves LLaVA-1.5, and the repo is a {config.model_type!r}: serve that with "
            "`transformers serve REPO --trust-remote-code`."
        )


def register() -> None:
    """Make the configuration, the processor and the architectures known; vLLM calls this once in each process."""
    from vllm import ModelRegistry

    import recoverable_llava  # noqa: F401  registers with transformers' Auto classes

    for architecture, model_class in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model_class)
