"""Models of full LLaVA-1.5 and LLaVA-NeXT size with random weights, made on the GPU, and inputs for them.

Speed does not depend on the weights, with one exception: how many tokens adaptive mode keeps. Random weights have no
attention that stands out, so the model computes its own scores as ever and goes on with drawn ones (`DrawnModel`).

All methods share one set of weights:

    stock      transformers' LLaVA, all N patches (in tiles also the new lines);
    ours       adaptive, and with a fixed budget;
    bound      stock LLaVA that is told for free which K patches to keep: no selector can be faster.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
)
from transformers.models.llava.modeling_llava import LlavaModel

from recoverable_llava import (
    RecoverableLlavaConfig,
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaNextConfig,
    RecoverableLlavaNextForConditionalGeneration,
    RecoverableLlavaNextModel,
    VisionFeatures,
)
from recoverable_llava.image_tiles import ImageTiles
from recoverable_llava.recoverable_vision import RecoverableVisionMixin, ScoredImages


IMAGE_TOKEN = 32000
MEAN_TOKENS = 58  # what the paper keeps of 576 on average


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the towers are CLIP ViT-L/14-336's unless said otherwise.

    mean_tokens: what adaptive mode is made to keep on average.
    budgets: of the fixed mode, where it is measured with more than one.
    is_tiled: LLaVA-NeXT, with pictures of two by two tiles; else LLaVA-1.5.
    """

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
    mean_tokens: int = MEAN_TOKENS
    budgets: tuple[int, ...] = ()
    is_tiled: bool = False

    @property
    def tiles(self) -> ImageTiles:
        """Of the picture that a tiled model gets: two by two and the base tile, without padding."""
        size = (2 * self.image_size, 2 * self.image_size)
        return ImageTiles.of(size, self.pinpoints, self.image_size, self.image_size // 14)

    @property
    def pinpoints(self) -> list[list[int]]:
        one, two, three = (self.image_size * tiles for tiles in (1, 2, 3))
        return [[one, two], [two, one], [two, two], [three, one], [one, three]]

    @property
    def num_patches(self) -> int:
        return self.tiles.num_patches if self.is_tiled else (self.image_size // 14) ** 2

    @property
    def num_tokens(self) -> int:
        """Placeholders of an image in a stock prompt."""
        return self.tiles.num_tokens if self.is_tiled else self.num_patches

    @property
    def num_drawn(self) -> int:
        """Images that are drawn, which larger batches repeat: a tiled one holds five times as many patches."""
        return 8 if self.is_tiled else 64


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7B", 4096, 11008, 32, 32),
        Shape("13B", 5120, 13824, 40, 40),
        # The language model is Vicuna-7B's, whose every head has keys of its own.
        Shape("NeXT-7B", 4096, 11008, 32, 32, mean_tokens=320, budgets=(320, 160), is_tiled=True),
        # For the tests.
        Shape("tiny", 64, 128, 2, 4, 2, 32, 2, 32, 112, 8, mean_tokens=16),
        Shape("tiny-NeXT", 64, 128, 2, 4, 2, 32, 2, 32, 112, 8, 20, budgets=(20, 9), is_tiled=True),
    )
}


@dataclass(frozen=True)
class Drawn:
    """What takes the place of random weights' outputs, for a few images that larger batches repeat."""

    visual_scores: torch.Tensor  # [I, N]
    text_scores: torch.Tensor  # [I, N]
    patches: torch.Tensor  # [I, N, C]

    def first(self, count: int) -> "Drawn":
        """The first `count` images, again from the start where there are not as many."""
        num_images = len(self.visual_scores)
        if count <= num_images:
            return Drawn(self.visual_scores[:count], self.text_scores[:count], self.patches[:count])
        index = torch.arange(count, device=self.patches.device) % num_images
        return Drawn(self.visual_scores[index], self.text_scores[index], self.patches[index])

    def only(self, image: int) -> "Drawn":
        """One image in every row."""
        of_image = (values[image].expand_as(values) for values in (self.visual_scores, self.text_scores, self.patches))
        return Drawn(*of_image)


def draw(num_images: int, num_patches: int, channels: int, mean_tokens: int = MEAN_TOKENS, seed: int = 2) -> Drawn:
    """Scores with heavy tails, and patches of which about `mean_tokens` (± a fifth) differ from all others.

    Class attention is the softmax of Student's t (3 degrees of freedom), relevance Student's t (2): the paper's preset
    then keeps 56 ± 11 of 576 patches. An image's patches scatter closely around as many centres as there are tokens to
    keep, so the default preset, which counts patches that are new, keeps `mean_tokens` ± a fifth.
    """
    generator = torch.Generator().manual_seed(seed)

    def students_t(degrees: int) -> torch.Tensor:
        normal = torch.randn(num_images, num_patches, generator=generator)
        spread = torch.randn(num_images, num_patches, degrees, generator=generator).square().mean(2).sqrt()
        return normal / spread

    visual, text = students_t(3).softmax(1), 0.15 + 0.02 * students_t(2)
    num_centres = (
        (mean_tokens * (1 + 0.2 * torch.randn(num_images, 1, generator=generator))).long().clamp(2, num_patches)
    )
    centres = torch.randn(num_images, num_patches, channels, generator=generator)
    member = torch.arange(num_patches) % num_centres  # every centre has a patch
    noise = torch.randn(num_images, num_patches, channels, generator=generator)
    patches = centres.gather(1, member[:, :, None].expand(-1, -1, channels)) + 0.1 * noise
    return Drawn(visual, text, patches)


class DrawnMixin(RecoverableVisionMixin):
    """Computes attention, relevance and features as ever, then chooses by drawn ones."""

    drawn: Drawn | None = None

    def encode_images(self, *args: Any, **kwargs: Any) -> tuple[Any, VisionFeatures]:
        outputs, vision = super().encode_images(*args, **kwargs)
        if self.drawn is None:
            return outputs, vision
        drawn = self.drawn.first(len(vision.patches))
        return outputs, replace(vision, visual_scores=drawn.visual_scores, patches=drawn.patches)

    def score(self, *args: Any, **kwargs: Any) -> ScoredImages:
        images = super().score(*args, **kwargs)
        if self.drawn is None or images.text_scores is None:
            return images
        return replace(images, text_scores=self.drawn.first(len(images.text_scores)).text_scores)


class DrawnModel(DrawnMixin, RecoverableLlavaModel):
    pass


class OurLlava(RecoverableLlavaForConditionalGeneration):
    model_class = DrawnModel


class DrawnNextModel(DrawnMixin, RecoverableLlavaNextModel):
    pass


class OurLlavaNext(RecoverableLlavaNextForConditionalGeneration):
    model_class = DrawnNextModel


class CapturableMixin(nn.Module):
    """Stock, but without the check that placeholders match features while a CUDA graph is captured."""

    def get_placeholder_mask(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> torch.Tensor:
        is_traced = torch.compiler.is_compiling()
        if not is_traced and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return (input_ids == self.config.image_token_id)[:, :, None]
        return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)


class BoundMixin(CapturableMixin):
    """Stock, with the first `num_tokens` patches of every image: the vision tower and a short prompt, no selection."""

    num_tokens = MEAN_TOKENS

    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tiles = pixel_values.flatten(0, -4)  # [all tiles, 3, H, W]
        outputs = self.vision_tower(tiles, output_hidden_states=True)
        features = outputs.hidden_states[self.config.vision_config.num_hidden_layers - 1][:, 1:]
        patches = features.reshape(len(pixel_values), -1, features.shape[-1])
        outputs.pooler_output = list(self.multi_modal_projector(patches[:, : self.num_tokens]))
        return outputs


class StockModel(CapturableMixin, LlavaModel):
    pass


class BoundModel(BoundMixin, LlavaModel):
    pass


class StockNextModel(CapturableMixin, LlavaNextModel):
    pass


class BoundNextModel(BoundMixin, LlavaNextModel):
    pass


class StockLlava(LlavaForConditionalGeneration):
    model_class = StockModel

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.model = self.model_class(config)  # a second one costs nothing on the meta device, where `build` makes it


class BoundLlava(StockLlava):
    model_class = BoundModel


class StockLlavaNext(LlavaNextForConditionalGeneration):
    model_class = StockNextModel

    def __init__(self, config: LlavaNextConfig):
        super().__init__(config)
        self.model = self.model_class(config)


class BoundLlavaNext(StockLlavaNext):
    model_class = BoundNextModel


@dataclass
class Models:
    ours: Any
    stock: Any
    bound: Any


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
    if shape.is_tiled:
        settings["image_grid_pinpoints"] = shape.pinpoints
        our_config, stock_config = RecoverableLlavaNextConfig, LlavaNextConfig
        our_class, stock_class, bound_class = OurLlavaNext, StockLlavaNext, BoundLlavaNext
    else:
        our_config, stock_config = RecoverableLlavaConfig, LlavaConfig
        our_class, stock_class, bound_class = OurLlava, StockLlava, BoundLlava
    config = our_config(
        **settings,
        question_config=question.to_dict(),
        visual_lof_neighbors=shape.lof_neighbors,
        text_lof_neighbors=shape.lof_neighbors,
    )
    with torch.device(device):
        ours = our_class._from_config(config, dtype=dtype).eval()
    drawn = draw(shape.num_drawn, shape.num_patches, shape.tower_width, shape.mean_tokens)
    ours.model.drawn = Drawn(
        drawn.visual_scores.to(device), drawn.text_scores.to(device), drawn.patches.to(device, dtype)
    )
    with torch.device("meta"):
        stock = stock_class._from_config(stock_config(**settings), dtype=dtype)
        bound = bound_class._from_config(stock_config(**settings), dtype=dtype)
    shared = ("vision_tower", "multi_modal_projector", "language_model") + ("image_newline",) * shape.is_tiled
    for other in (stock, bound):
        for name in shared:
            setattr(other.model, name, getattr(ours.model, name))
        other.lm_head = ours.lm_head
        other.eval()
    for model in (ours, stock, bound):
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    bound.model.num_tokens = shape.mean_tokens
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
    side, tiles = shape.image_size, (shape.tiles.num_tiles,) if shape.is_tiled else ()
    pixels = torch.randn(batch_size, *tiles, 3, side, side, generator=generator, device=device)
    sizes = {"image_sizes": torch.full((batch_size, 2), 2 * side, device=device)} if shape.is_tiled else {}
    return sizes | {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels.to(dtype),
        "question_input_ids": questions,
        "question_attention_mask": torch.ones_like(questions),
    }


def without_question(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("question")}
