"""For clients of an engine: as many visual tokens as image and question deserve.

Inside vLLM an image's placeholders are fixed before the image is encoded, so the engine works with a fixed budget. In
adaptive mode the number of tokens is a result. This runs the towers and the recovery on the client's side, without a
language model, and sends visual tokens (`image_embeds`) in place of the picture. The server needs --enable-mm-embeds.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from recoverable_llava import RecoverableLlavaProcessor, RecoverableLlavaVisionModel

from . import check_family


class ImageEmbedder:
    """The towers and the processor of a repo.

    Args:
        repo: folder or Hub repo id.
        device: such as "cpu" or "cuda".
        dtype: that of the tokens; by default the checkpoint's.

    Raises:
        ValueError: if the repo is of a family that the plugin does not run.
    """

    def __init__(self, repo: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto"):
        check_family(AutoConfig.from_pretrained(repo))
        self.model: Any = RecoverableLlavaVisionModel.from_pretrained(repo, dtype=dtype, use_safetensors=True)
        self.model = self.model.to(device).eval()
        self.processor: Any = RecoverableLlavaProcessor.from_pretrained(repo)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> torch.Tensor:
        """[K, D] visual tokens for the question, on the CPU: `multi_modal_data={"image": ...}` of `LLM.generate`.

        K is adaptive, or `model.config.visual_token_budget` where that is set.
        """
        inputs = self.processor(images=image, questions=[question], return_tensors="pt").to(self.model.device)
        pixel_values, *question_rows = (
            inputs[name] for name in ("pixel_values", "question_input_ids", "question_attention_mask")
        )
        vision = self.model.get_vision_features(pixel_values.to(self.model.dtype))
        questions = self.model.embed_questions(1, *question_rows)
        settings = self.model.config.recovery_settings()
        recovery = self.model.recover(vision, questions, settings, sizes=_all_kept)
        return self.model.project(vision, recovery.assembly)[0].cpu()


def _all_kept(selection: Any) -> tuple[int, int]:
    """How many tokens the one image of a selection has, and how many of them are merged ones."""
    return int(selection.num_tokens), int(selection.num_merged)


def image_embeds_part(embeds: torch.Tensor) -> dict[str, str]:
    """The part of a chat message that carries visual tokens [K, D] to a vLLM server, as a NumPy file."""
    file = io.BytesIO()
    np.save(file, embeds.float().numpy(), allow_pickle=False)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}
