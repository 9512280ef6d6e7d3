"""LLaVA-NeXT (LLaVA-1.6) with recoverable compression built in: what this family adds to what all families share.

An image is a base tile and up to four more. One selection runs over the patches of all its tiles together, so that a
large object may stay in the base tile and a small one where it is sharp; new lines between rows are dropped with the
rest. `image_tiles.py` says which patch of which tile is which token; all else is as in modeling_recoverable_llava.py.

I images, T tiles of all of them, N the most patches of an image, P patches of a tile, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast

from .configuration_recoverable_llava_next import RecoverableLlavaNextConfig, check_strategy
from .image_tiles import ImageTiles, TileGrids
from .recoverable_generation import RecoverableGenerationMixin
from .recoverable_model import FullCounts, ImageInputs, RecoverableModelMixin, sizes_on_host
from .recoverable_vision import RecoverableVisionMixin, Recovery, VisionFeatures
from .token_assembly import Assembly
from .transformers_names import in_order_of, register_checkpoint_layouts


register_checkpoint_layouts(RecoverableLlavaNextConfig.model_type, like="llava_next")


class LlavaNextFamilyMixin(RecoverableVisionMixin):
    """LLaVA-NeXT: tiles of P patches; of these an image has what holds a picture, in rows that end in a new line."""

    stock_name = "LlavaNextModel"
    config: RecoverableLlavaNextConfig
    vision_tower: Any
    image_newline: torch.Tensor

    def grids_of(self, vision: VisionFeatures) -> TileGrids:
        return TileGrids.of(vision.tiles, vision.visual_scores.device)

    def around(self, vision: VisionFeatures) -> Callable[[torch.Tensor], torch.Tensor]:
        return self.grids_of(vision).highest_around()

    def full_counts(self, images: ImageInputs, device: torch.device) -> FullCounts:
        check_strategy(images.options.get("vision_feature_select_strategy", self.config.vision_feature_select_strategy))
        pixel_rows = None
        if images.vision_features is not None:
            tiles = images.vision_features.tiles
        else:
            tiles = self.tiles_of(images.pixel_values, images.options.get("image_sizes"))
            if images.pixel_values.ndim == 4:
                pixel_rows = [each.num_tiles for each in tiles]
        counts = [each.num_tokens for each in tiles]
        per_image = torch.tensor(counts).to(device, non_blocking=True)
        return FullCounts(per_image, max(counts), sum(counts), pixel_rows)

    def tiles_of(self, pixel_values: torch.Tensor, image_sizes: Any) -> list[ImageTiles]:
        """How each image is cut into tiles.

        Raises:
            ValueError: if there are no sizes, or they do not belong to the pixels.
        """
        if image_sizes is None:
            raise ValueError(
                "image_sizes is missing: pass the (height, width) in pixels of every image, [images, 2], which the "
                "repo's processor returns along with pixel_values."
            )
        config = self.config
        sizes = sizes_on_host(image_sizes)
        tile_size, pinpoints = config.vision_config.image_size, list(config.image_grid_pinpoints)
        tiles = [ImageTiles.of(size, pinpoints, tile_size, config.grid_width) for size in sizes]
        if pixel_values.ndim not in (4, 5):
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}: pass [images, tiles, 3, height, width], or "
                "the tiles of all images [tiles, 3, height, width]."
            )
        if pixel_values.ndim == 4:
            total = sum(each.num_tiles for each in tiles)
            if len(pixel_values) != total:
                raise ValueError(
                    f"pixel_values has {len(pixel_values)} tiles, but image_sizes {sizes} make {total}: prepare both "
                    "with the repo's processor."
                )
            return tiles
        if len(pixel_values) != len(sizes):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} images, but image_sizes {len(sizes)}: pass one size per image."
            )
        for number, (size, each) in enumerate(zip(sizes, tiles)):
            if each.num_tiles > pixel_values.shape[1]:
                raise ValueError(
                    f"image {number} of {size[0]} x {size[1]} pixels makes {each.num_tiles} tiles, but pixel_values "
                    f"has {pixel_values.shape[1]}: prepare pixel_values and image_sizes with the repo's processor."
                )
        return tiles

    def encode_images(
        self, pixel_values: torch.Tensor, text_relevance: str, attention_layer: int, **options: Any
    ) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
        tiles = self.tiles_of(pixel_values, options.pop("image_sizes", None))
        strategy = options.pop("vision_feature_select_strategy", None)
        check_strategy(strategy or self.config.vision_feature_select_strategy)
        # Before the towers run, so that the host need not wait for them.
        index, valid = TileGrids.of(tiles, pixel_values.device).patch_index(max(each.num_patches for each in tiles))
        if pixel_values.ndim == 5:
            pixel_values = without_empty_tiles(pixel_values, tiles)
        outputs, features, *read = self.read_images(pixel_values, text_relevance, attention_layer, **options)
        # [T, P, ...] of tiles to [I, N, ...] of images.
        index, valid = index.to(features.device), valid.to(features.device)
        patches, visual_scores, keys, embeds = (each.flatten(0, 1)[index] for each in (features[:, 1:], *read))
        vision = VisionFeatures(
            patches=patches,
            class_tokens=None,
            visual_scores=visual_scores,
            keys=keys,
            relevance_embeds=embeds,
            last_hidden_state=outputs.last_hidden_state,
            valid=valid,
            tiles=tiles,
        )
        return outputs, vision

    def all_tokens(self, vision: VisionFeatures) -> torch.Tensor:
        projected = self.multi_modal_projector(vision.patches)
        index, is_new_line = self.grids_of(vision).token_index(max(each.num_tokens for each in vision.tiles))
        tokens = projected.gather(1, index.to(projected.device)[:, :, None].expand(-1, -1, projected.shape[-1]))
        return torch.where(is_new_line.to(tokens.device)[:, :, None], self.image_newline.to(tokens), tokens)

    def project(self, vision: VisionFeatures, assembly: Assembly) -> torch.Tensor:
        tokens = super().project(vision, assembly)
        if torch.is_grad_enabled() and self.image_newline.requires_grad:
            # Dropped like other tokens; data-parallel training wants to find it in the graph all the same.
            tokens = tokens + 0 * self.image_newline.to(tokens)
        return tokens

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: Any = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `RecoverableVisionMixin.get_image_features`; stock LLaVA-NeXT passes the sizes in the second place.

        Raises:
            ValueError: if the sizes do not belong to the pixels, or for the `"full"` strategy, as in the other calls.
        """
        check_strategy(vision_feature_select_strategy or self.config.vision_feature_select_strategy)
        sizes = None if image_sizes is None else sizes_on_host(image_sizes)
        self.tiles_of(pixel_values, sizes)
        return super().get_image_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, sizes, **kwargs
        )


def without_empty_tiles(pixel_values: torch.Tensor, tiles: list[ImageTiles]) -> torch.Tensor:
    """[T, 3, H, W] the tiles that images [I, most tiles, 3, H, W] have; shorter images are padded with empty ones."""
    num_columns = pixel_values.shape[1]
    every = pixel_values.flatten(0, 1)
    if all(each.num_tiles == num_columns for each in tiles):
        return every
    index = [row * num_columns + number for row, each in enumerate(tiles) for number in range(each.num_tiles)]
    return every[torch.tensor(index).to(every.device, non_blocking=True)]


class RecoverableLlavaNextModel(LlavaNextFamilyMixin, RecoverableModelMixin, LlavaNextModel):
    config: RecoverableLlavaNextConfig
    forward = in_order_of(LlavaNextModel.forward, RecoverableModelMixin.forward)

    def __init__(self, config: RecoverableLlavaNextConfig):
        super().__init__(config)
        self.add_recovery()


class RecoverableLlavaNextForConditionalGeneration(RecoverableGenerationMixin, LlavaNextForConditionalGeneration):
    config: RecoverableLlavaNextConfig
    stock_class = LlavaNextForConditionalGeneration
    model_class = RecoverableLlavaNextModel
    output_class = LlavaNextCausalLMOutputWithPast
    forward = in_order_of(LlavaNextForConditionalGeneration.forward, RecoverableGenerationMixin.forward)


__all__ = [
    "RecoverableLlavaNextForConditionalGeneration",
    "RecoverableLlavaNextModel",
    "Recovery",
    "VisionFeatures",
]
