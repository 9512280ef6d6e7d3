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

from recoverable_llava import RecoverableLlavaProcessor

from ._vision_model import RecoverableLlavaVisionModel, question_inputs


class ImageEmbedder:
    """The towers and the processor of a repo.

    Args:
        repo: folder or Hub repo id.
        device: such as "cpu" or "cuda".
        dtype: that of the tokens; by default the checkpoint's.
    """

    def __init__(self, repo: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto"):
        self.model: Any = RecoverableLlavaVisionModel.from_pretrained(repo, dtype=dtype, use_safetensors=True)
        self.model = self.model.to(device).eval()
        self.processor: Any = RecoverableLlavaProcessor.from_pretrained(repo)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> torch.Tensor:
        """[K, D] visual tokens for the question, on the CPU: `multi_modal_data={"image": ...}` of `LLM.generate`.

        K is adaptive, or `model.config.visual_token_budget` where that is set.
        """
        pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixel_values, **question_inputs(self.processor, [question])}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return self.model.get_image_features(**inputs)[0].cpu()


def image_embeds_part(embeds: torch.Tensor) -> dict[str, str]:
    """The part of a chat message that carries visual tokens [K, D] to a vLLM server, as a NumPy file."""
    file = io.BytesIO()
    np.save(file, embeds.float().numpy(), allow_pickle=False)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}
