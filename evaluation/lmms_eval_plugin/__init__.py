"""Plug-in that lets lmms-eval run a recoverable-llava repo: `--model recoverable_llava`.

lmms-eval 0.7 cannot load it by itself: `llava_hf` reads the configuration without `trust_remote_code` and answers one
question at a time, and `huggingface` takes any model type that it does not know for a bare `AutoModel`, which cannot
generate. This module is found through the entry point group `lmms_eval.models`.
"""

from typing import Any


def manifests() -> Any:
    """What lmms-eval calls to learn about the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="recoverable_llava", simple_class_path="evaluation.lmms_eval_plugin.model.RecoverableLlavaForLmmsEval"
    )
