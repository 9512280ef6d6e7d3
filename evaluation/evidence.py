"""What a selection rule may look at: one batch of images and questions, as the vision and text towers see them.

Published rules of token selection differ in which layer, which keys and which embeddings they read. All of it is
gathered here once per batch, so that a rule is a pure function of this record and of a budget.

B images (or tiles) of N patches, C channels of the vision tower, D channels of the language model, J of the joint CLIP
space, T question tokens.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from recoverable_llava.image_tiles import ImageTiles, TileGrids


@dataclass(frozen=True, kw_only=True)
class Evidence:
    grid: tuple[int, int]  # rows and columns of patches
    patches: torch.Tensor  # [B, N, C] the features that LLaVA takes (layer -2), without the class token
    projected: torch.Tensor  # [B, N, D] the same through LLaVA's projector
    keys: torch.Tensor  # [B, N, C] attention keys of the last layer
    previous_keys: torch.Tensor  # [B, N, C] attention keys of the layer before it
    class_attention: torch.Tensor  # [B, N] of the last layer, mean over heads
    previous_class_attention: torch.Tensor  # [B, N] of the layer before it, mean over heads
    first_class_attention: torch.Tensor  # [B, N] of the first layer, mean over heads
    undivided_class_attention: torch.Tensor  # [B, N] of the last layer, all heads taken as one
    patch_embeddings: torch.Tensor  # [B, N, J] layer -2 through post_layernorm and visual_projection
    bare_patch_embeddings: torch.Tensor  # [B, N, J] the last layer through visual_projection alone
    question_embedding: torch.Tensor  # [B, J] pooled and projected
    question_token_embeddings: torch.Tensor  # [B, T, J] every token of the question, projected
    question_token_mask: torch.Tensor  # [B, T] bool: the question's own tokens
    constant_guide: torch.Tensor  # [B, J] the system prompt at the last padded position, projected
    relevance_embeds: dict[str, torch.Tensor]  # name of a text_relevance of the model -> [B, N, J]
    relevance: dict[str, torch.Tensor]  # the same times the question's embedding -> [B, N]
    valid: torch.Tensor | None = None  # [B, N] bool, False where an image has no patch; None means all True
    image: torch.Tensor | None = None  # [B] rows with the same number are tiles of one image; None: each is an image
    # What rules have picked so far, one patch after the other: a smaller budget is served from it.
    picked: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def rows(self, some: torch.Tensor) -> "Evidence":
        """Some of the rows [R], indices."""
        return Evidence(**{name: _each(value, lambda tensor: tensor[some]) for name, value in self._given().items()})

    def _given(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(Evidence) if each.name != "picked"}


@dataclass(frozen=True, kw_only=True)
class TiledEvidence(Evidence):
    """Of images that were cut into tiles, in the order of the model's own features; see image_tiles.py."""

    valid: torch.Tensor
    layouts: tuple[ImageTiles, ...]  # [B]
    of_tiles: Evidence  # a row for every tile of every image, with the patches that are padding

    @classmethod
    def of(cls, of_tiles: Evidence, layouts: tuple[ImageTiles, ...]) -> "TiledEvidence":
        """The evidence of images from that of their tiles, which stand one behind the other."""
        device = of_tiles.patches.device
        grids = TileGrids.of(layouts, device)
        index, valid = grids.patch_index(max(layout.num_patches for layout in layouts))
        first_tile = grids.first_tile[:, 0]
        given = {}
        for name, value in of_tiles._given().items():
            if name in OF_QUESTIONS:
                given[name] = value[first_tile]
            else:
                given[name] = _each(value, lambda tensor: tensor.flatten(0, 1)[index])
        return cls(**given | {"valid": valid, "image": None}, layouts=layouts, of_tiles=of_tiles)


OF_QUESTIONS = ("question_embedding", "question_token_embeddings", "question_token_mask", "constant_guide", "image")


def _each(value: Any, function: Any) -> Any:
    """`function` of a tensor, or of each tensor in a dictionary; anything else as it is."""
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value
