"""Models of full LLaVA-1.5 size with random weights, made on the GPU, and inputs for them.

Speed does not depend on the weights, with one exception: how many tokens adaptive mode keeps. Random weights have no
attention that stands out, so the model computes its own scores as ever and goes on with drawn ones (`DrawnScores`).

All methods share one set of weights:

    stock      transformers' LLaVA, all N patches;
    ours       adaptive, and with a fixed budget;
    bound      stock LLaVA that is told for free which K patches to keep: no selector can be faster.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

from recoverable_llava import RecoverableLlavaConfig, RecoverableLlavaForConditionalGeneration, RecoverableLlavaModel
from recoverable_llava.modeling_recoverable_llava import VisionFeatures


IMAGE_TOKEN = 32000
MEAN_TOKENS = 58  # what the paper keeps of 576 on average


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the towers are CLIP ViT-L/14-336's unless said otherwise."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    tower_layers: int = 24
    tower_width: int = 1024
    question_layers: int = 12
    question_width: int = 768
    image_size: int = 336
    lof_neighbors: int = 20

    @property
    def num_patches(self) -> int:
        return (self.image_size // 14) ** 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7B", 4096, 11008, 32, 32),
        Shape("13B", 5120, 13824, 40, 40),
        Shape("tiny", 64, 128, 2, 4, 2, 32, 2, 32, image_size=112, lof_neighbors=8),  # for the tests
    )
}


def draw_scores(num_images: int, num_patches: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Class attention and relevance [I, N] with heavy tails, so that LOF keeps about 56 of 576 patches (± 11).

    Student's t with 3 and 2 degrees of freedom; the first through a softmax, as attention is one.
    """
    generator = torch.Generator().manual_seed(seed)

    def students_t(degrees: int) -> torch.Tensor:
        normal = torch.randn(num_images, num_patches, generator=generator)
        spread = torch.randn(num_images, num_patches, degrees, generator=generator).square().mean(2).sqrt()
        return normal / spread

    return students_t(3).softmax(1), 0.15 + 0.02 * students_t(2)


class DrawnScores(RecoverableLlavaModel):
    """Computes class attention and relevance as ever, then goes on with drawn ones."""

    drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_vision_features(self, *args: Any, **kwargs: Any) -> VisionFeatures:
        vision = super().get_vision_features(*args, **kwargs)
        return vision if self.drawn is None else replace(vision, visual_scores=self.drawn[0][: len(vision.patches)])

    def _text_scores(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        scores, has_question = super()._text_scores(*args, **kwargs)
        return scores if self.drawn is None or scores is None else self.drawn[1][: len(scores)], has_question


class OurLlava(RecoverableLlavaForConditionalGeneration):
    def __init__(self, config: RecoverableLlavaConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = DrawnScores(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class BoundModel(LlavaModel):
    """Stock, with the first `num_tokens` patches of every image: the vision tower and a short prompt, no selection."""

    num_tokens = MEAN_TOKENS

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        outputs = self.vision_tower(
            pixel_values, output_hidden_states=[self.config.vision_config.num_hidden_layers - 1]
        )
        features = outputs.hidden_states[self.config.vision_config.num_hidden_layers - 1]
        outputs.pooler_output = list(self.multi_modal_projector(features[:, 1 : 1 + self.num_tokens]))
        return outputs


class BoundLlava(LlavaForConditionalGeneration):
    def __init__(self, config: LlavaConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = BoundModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


@dataclass
class Models:
    ours: OurLlava
    stock: LlavaForConditionalGeneration
    bound: BoundLlava


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Models:
    """The three models around one set of random weights, created on the device itself."""
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_width // min(64, shape.tower_width // 2),
        image_size=shape.image_size,
        patch_size=14,
        projection_dim=shape.question_width,
    )
    question = CLIPTextConfig(
        hidden_size=shape.question_width,
        intermediate_size=4 * shape.question_width,
        num_hidden_layers=shape.question_layers,
        num_attention_heads=shape.question_width // min(64, shape.question_width // 2),
        projection_dim=shape.question_width,
    )
    language = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=4096,
        vocab_size=32064,
    )
    settings = {"vision_config": vision.to_dict(), "text_config": language.to_dict(), "image_token_index": IMAGE_TOKEN}
    config = RecoverableLlavaConfig(
        **settings,
        question_config=question.to_dict(),
        visual_lof_neighbors=shape.lof_neighbors,
        text_lof_neighbors=shape.lof_neighbors,
    )
    with torch.device(device):
        ours = OurLlava._from_config(config, dtype=dtype).eval()
        drawn = draw_scores(1024, shape.num_patches)
    ours.model.drawn = tuple(scores.to(device) for scores in drawn)
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration._from_config(LlavaConfig(**settings), dtype=dtype)
        bound = BoundLlava._from_config(LlavaConfig(**settings), dtype=dtype)
    for other in (stock, bound):
        for name in ("vision_tower", "multi_modal_projector", "language_model"):
            setattr(other.model, name, getattr(ours.model, name))
        other.lm_head = ours.lm_head
        other.eval()
    for model in (ours, stock, bound):
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    bound.model.num_tokens = min(MEAN_TOKENS, shape.num_patches // 4)
    return Models(ours, stock, bound)


def make_inputs(
    shape: Shape, batch_size: int, num_placeholders: int, device: torch.device, dtype: torch.dtype, num_text: int = 64
) -> dict[str, torch.Tensor]:
    """What a processor returns for one image and `num_text` text tokens a prompt, on the device."""
    generator = torch.Generator(device=device).manual_seed(0)

    def integers(low: int, high: int, length: int) -> torch.Tensor:
        return torch.randint(low, high, (batch_size, length), generator=generator, device=device)

    image = torch.full((batch_size, num_placeholders), IMAGE_TOKEN, device=device)
    input_ids = torch.cat([integers(3, 30000, 4), image, integers(3, 30000, num_text - 4)], dim=1)
    questions = integers(1000, 40000, 77)
    questions[:, 16:] = 49407  # end of text, and padding
    pixels = torch.randn(batch_size, 3, shape.image_size, shape.image_size, generator=generator, device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels.to(dtype),
        "question_input_ids": questions,
        "question_attention_mask": torch.ones_like(questions),
    }


def without_question(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("question")}
