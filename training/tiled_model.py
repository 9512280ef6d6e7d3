"""The small LLaVA-NeXT, trained from the LLaVA-1.5 of `model.py` on the larger pictures of `tiles.py`.

The losses are those of `model.py`; what differs:
- a picture is a base view and tiles, each of which the vision tower sees alone;
- a tile does not know where in the picture it lies. Its tokens are therefore trained to say "nothing" of row and
  column, those of the base view to name them for the whole picture, and the base view to name small objects too:
  so places are read from features, whichever tokens are left and however they are counted;
- words that the base view shows too small are "nothing" there, and are read from the tiles;
- the contrastive loss compares texts with views, each with what lies in it. The question tower and the projection of
  images stay as they are, so that the vision tower moves and CLIP's space does not.

The vision tower always sees all patches and the language model all visual tokens that stock's has.

Shapes: B pictures, V views each, N patches of a view, D channels of the language model, L visual tokens of a picture.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from .model import ModelSize, TrainingModel, language_config, llava_settings
from .questions import FACTS, PAIR_FACTS, WORD_FACTS
from .render import patch_targets
from .scenes import IMAGE_SIZE, OBJECT_FIELDS
from .tiles import PINPOINTS, Tiling, picture_views, tiling
from .vocabulary import COLORS, COLUMNS, ROWS


LONGEST_PROMPT = 4096  # 2,928 visual tokens at most, new lines included


def llava_next_config(size: ModelSize) -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=language_config(size, LONGEST_PROMPT), image_grid_pinpoints=PINPOINTS, **llava_settings(size)
    )


def recounted_positions(batch: int, base: int, newline: Tensor, start: int, text: int) -> Tensor:
    """Position ids [B, start + L + T] of the language model in training.

    Two of five rows count as usual. In the others the visual tokens stand closer together, those of the base view and
    those of the tiles each by a factor of their own and unevenly, and new lines take no room: as if most of them had
    been dropped and the rest counted anew. In one of five they are also shuffled, tokens of the base view among
    themselves and those of the tiles among themselves. No token is dropped.

    Args:
        base: tokens of the base view, which come first.
        newline: which of the visual tokens [L] are new lines.
    """
    device, visual = newline.device, len(newline)
    draw = torch.rand(batch, 1, device=device)
    of_base = torch.arange(visual, device=device) < base
    density = 0.03 ** torch.rand(batch, 2, device=device)
    room = torch.where(of_base, density[:, :1], density[:, 1:]) * 2 * torch.rand(batch, visual, device=device)
    room = torch.where(draw < 0.4, 1.0, room * ~newline)
    places = start + room.cumsum(1) - room
    order = (torch.rand(batch, visual, device=device) + ~of_base).argsort(1)
    places = torch.where(draw < 0.8, places, places.gather(1, order))
    before = torch.arange(start, device=device, dtype=torch.float32).expand(batch, -1)
    after = start + room.sum(1, keepdim=True) + torch.arange(text, device=device, dtype=torch.float32)
    return torch.cat([before, places, after], 1)


def view_facts(objects: Tensor, windows: Tensor) -> Tensor:
    """What each view shows, as `questions.scene_facts` numbers it, of the objects whose center lies in it: [B * V, F].

    Args:
        objects: of `scenes.scene_arrays` [B, M, 12].
        windows: as in `render.patch_targets` [V, 4].
    """
    field = {name: objects[:, None, :, index].long() for index, name in enumerate(OBJECT_FIELDS)}
    left, top, width, height = (windows[None, :, None, index] for index in range(4))

    def inside(x: Tensor, y: Tensor) -> Tensor:
        return (x >= left) & (x < left + width) & (y >= top) & (y < top + height)

    shown = inside(field["left"] + field["size"] / 2, field["top"] + field["size"] / 2) & (field["class_index"] >= 0)
    label = (field["label_left"] + field["label_width"] / 2, field["label_top"] + field["label_height"] / 2)
    numbers = (
        torch.where(shown, field["class_index"], FACTS),
        torch.where(shown, PAIR_FACTS + field["class_index"] * len(COLORS) + field["color"], FACTS),
        torch.where(shown & inside(*label) & (field["word"] >= 0), WORD_FACTS + field["word"], FACTS),
    )
    numbers = torch.cat(numbers, 2).flatten(0, 1)
    facts = torch.zeros(len(numbers), FACTS + 1, dtype=torch.bool, device=objects.device)
    return facts.scatter_(1, numbers, True)[:, :FACTS]


class TiledTrainingModel(TrainingModel):
    """LLaVA-NeXT, the question tower and the CLIP projections, with the training losses."""

    views_without_place = True

    def __init__(self, size: ModelSize) -> None:
        super().__init__(size)
        nn.init.zeros_(self.llava.model.image_newline)  # harmless to a language model that has never seen it
        self.question_tower.requires_grad_(False)
        self.visual_projection.requires_grad_(False)
        self.layout = lru_cache(self._layout)
        self.windows = lru_cache(self._windows)

    def build_llava(self) -> nn.Module:
        return LlavaNextForConditionalGeneration(llava_next_config(self.size))

    def compile_parts(self) -> None:
        """Compiles the trained layers and the renderer, once for all shapes; the rest is not worth the wait."""
        for tower in (self.llava.model.vision_tower.encoder, self.llava.model.language_model):
            for layer in tower.layers:
                layer.compile(dynamic=True)
        self.render = torch.compile(self.render, dynamic=True)

    def start_from(self, trained: TrainingModel) -> None:
        """Takes all weights of a LLaVA-1.5, which has no new line."""
        own = self.state_dict()
        self.load_state_dict(own | trained.state_dict())

    def _windows(self, seen: Tiling) -> Tensor:
        return torch.tensor(seen.windows, device=self.llava.model.image_newline.device)

    def _layout(self, seen: Tiling) -> Tensor:
        """Which token of the V * N of a picture's views each visual token is, -1 for a new line: [L]."""
        patches = self.llava.config.image_seq_length
        device = self.llava.model.image_newline.device
        numbers = torch.arange(seen.views * patches, device=device, dtype=torch.float32).view(seen.views, patches, 1)
        packed, _ = self.llava.model.pack_image_features(
            [numbers], [seen.picture], "default", torch.full((1,), -1.0, device=device)
        )
        return packed[0].flatten().long()

    def pack(self, visual_tokens: Tensor, seen: Tiling) -> Tensor:
        """Tokens of the views [B, V, N, D] as the prompt has them, without padding and with new lines: [B, L, D]."""
        layout = self.layout(seen)
        packed = visual_tokens.flatten(1, 2).index_select(1, layout.clamp_min(0))
        return torch.where((layout < 0)[:, None], self.llava.model.image_newline.to(packed.dtype), packed)

    def forward(self, batch: dict[str, Tensor], constants: dict[str, Tensor], jitter: bool = True) -> dict[str, Tensor]:
        """Losses and measures of one batch of `data.TiledBatchMaker`."""
        seen = tiling(*batch["picture_size"])
        height, width = seen.canvas
        with torch.no_grad():
            views = picture_views(self.render(batch, constants, height, width), seen)
            patches = IMAGE_SIZE // self.size.patch_size
            targets, _ = patch_targets(batch, constants, patches, self.windows(seen), height, width)
            targets = targets.unflatten(0, views.shape[:2])
            targets[:, 1:, :, 4], targets[:, 1:, :, 5] = len(ROWS), len(COLUMNS)
            facts = view_facts(batch["objects"], self.windows(seen))
            texts = self.texts(batch["captions"].flatten(0, 1)).unflatten(0, batch["captions"].shape[:2])
        features, image_embeddings = self.vision(views.flatten(0, 1))
        visual_tokens = self.llava.model.multi_modal_projector(features).unflatten(0, views.shape[:2])
        base, base_accuracy = self.dense_loss(visual_tokens[:, 0], targets[:, 0])
        tiles, tile_accuracy = self.dense_loss(visual_tokens[:, 1:].flatten(0, 1), targets[:, 1:].flatten(0, 1))
        contrastive, retrieved = self.contrastive_loss(image_embeddings, texts, batch["caption_facts"], facts)
        start, text = batch["prefix"].shape[1], batch["text"].shape[1]
        positions = recounted_positions(len(views), patches**2, self.layout(seen) < 0, start, text)
        answers, turn_right = self.answers(batch, self.pack(visual_tokens, seen), positions if jitter else None)
        return {
            "answers": answers, "contrastive": contrastive, "dense": base + tiles, "dense_accuracy": base_accuracy,
            "tile_accuracy": tile_accuracy, "retrieved": retrieved, "turn_right": turn_right,
        }  # fmt: skip
