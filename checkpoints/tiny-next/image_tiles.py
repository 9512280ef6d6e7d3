"""How LLaVA-NeXT cuts an image into tiles, and which patch of which tile is which token.

An image becomes a base tile, the whole picture squeezed into one, and a grid of tiles cut from the picture at a higher
resolution. Of the patches of the grid those stay that hold a picture, not padding, and every row of them ends in a new
line. Which they are, stock's own functions say: nothing of its choice of a resolution, its rounding or its unpadding is
written again here.

    tokens of an image:  G * G of the base tile | columns of the first row, new line | columns of the second, ...

"Patches of an image" are these tokens without the new lines, in the same order.

I images, G patches along a side of a tile, N the most patches of an image, F its tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image


@dataclass(frozen=True)
class ImageTiles:
    """The tiles of one image: numbers on the host, so that shapes are known before a tower runs."""

    rows: int  # of patches that hold a picture, in the grid
    columns: int
    top: int  # rows of padding above them
    left: int
    tile_rows: int
    tile_columns: int
    grid_width: int  # G

    @classmethod
    def of(cls, image_size: Sequence[int], pinpoints: list[Any], tile_size: int, grid_width: int) -> "ImageTiles":
        """The tiles of an image of `image_size` (height, width) pixels.

        Args:
            pinpoints: (height, width) of the resolutions that an image may be brought to.
            tile_size: pixels along a side of a tile.
            grid_width: G.
        """
        tile_rows, tile_columns = get_anyres_image_grid_shape(tuple(image_size), pinpoints, tile_size)
        height, width = tile_rows * grid_width, tile_columns * grid_width
        # Shapes alone, so on no device: there is as much padding on one side as on the other.
        _, rows, columns = unpad_image(torch.empty(1, height, width, device="meta"), tuple(image_size)).shape
        top, left = (height - rows) // 2, (width - columns) // 2
        return cls(rows, columns, top, left, tile_rows, tile_columns, grid_width)

    @property
    def num_tiles(self) -> int:
        return 1 + self.tile_rows * self.tile_columns

    @property
    def num_patches(self) -> int:
        return self.grid_width**2 + self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """F: patches and new lines."""
        return self.num_patches + self.rows


@dataclass(frozen=True)
class TileGrids:
    """The grids of a batch of images as columns [I, 1] of numbers on a device."""

    rows: torch.Tensor
    columns: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    tile_columns: torch.Tensor
    first_tile: torch.Tensor  # of the image, among the tiles of all
    grid_width: int  # G

    @classmethod
    def of(cls, images: Sequence[ImageTiles], device: torch.device) -> "TileGrids":
        """One small copy to the device, which the host does not wait for."""
        numbers, first_tile = [], 0
        for tiles in images:
            numbers.append([tiles.rows, tiles.columns, tiles.top, tiles.left, tiles.tile_columns, first_tile])
            first_tile += tiles.num_tiles
        columns_of_numbers = torch.tensor(numbers).to(device, non_blocking=True)[:, :, None].unbind(1)
        rows, columns, top, left, tile_columns, first = columns_of_numbers
        return cls(rows, columns, top, left, tile_columns, first, images[0].grid_width)

    @property
    def num_base(self) -> int:
        """Patches of the base tile."""
        return self.grid_width**2

    def patch_index(self, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the patches of each image stand among those of all tiles.

        Returns:
            [I, N] long indices into the patches of all tiles one behind the other, and [I, N] bool, False behind an
            image's last patch (where the index is that of its first).
        """
        number = torch.arange(num_patches, device=self.rows.device)[None]
        place = number - self.num_base
        row = place.div(self.columns.clamp(min=1), rounding_mode="floor")
        column = place - row * self.columns
        row, column = row + self.top, column + self.left
        tile = 1 + row.div(self.grid_width, rounding_mode="floor") * self.tile_columns
        tile = tile + column.div(self.grid_width, rounding_mode="floor")
        within = row % self.grid_width * self.grid_width + column % self.grid_width
        valid = number < self.num_base + self.rows * self.columns
        index = torch.where(place < 0, number, tile * self.num_base + within)
        return self.first_tile * self.num_base + torch.where(valid, index, 0), valid

    def token_index(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[I, F] long, the patch that each token of an image is, and [I, F] bool, True for its new lines instead."""
        number = torch.arange(num_tokens, device=self.rows.device)[None]
        place = number - self.num_base
        row = place.div(self.columns + 1, rounding_mode="floor")
        column = place - row * (self.columns + 1)
        is_new_line = (place >= 0) & (column == self.columns) & (row < self.rows)
        index = torch.where(place < 0, number, self.num_base + row * self.columns + column)
        last = self.num_base + self.rows * self.columns - 1
        return index.minimum(last), is_new_line

    def highest_around(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that gives each patch of [I, kinds, N] the highest value among itself and the eight around it.

        Around it in the base tile, or in the joined tiles of the grid: what lies on two tiles is one picture.
        """

        def of(values: torch.Tensor) -> torch.Tensor:
            number = torch.arange(values.shape[2], device=values.device)[None]
            is_base = number < self.num_base
            width = torch.where(is_base, self.grid_width, self.columns.clamp(min=1))
            height = torch.where(is_base, self.grid_width, self.rows)
            first = torch.where(is_base, 0, self.num_base)
            row = (number - first).div(width, rounding_mode="floor")
            column = number - first - row * width
            step = torch.arange(-1, 2, device=values.device)
            row = row[:, :, None] + step.repeat_interleave(3)
            column = column[:, :, None] + step.repeat(3)
            width, height, first = width[:, :, None], height[:, :, None], first[:, :, None]
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            around = torch.where(is_inside, first + row * width + column, number[:, :, None])
            index = around.flatten(1)[:, None].expand(-1, values.shape[1], -1)
            return values.gather(2, index).unflatten(2, (-1, 9)).amax(3)

        return of
