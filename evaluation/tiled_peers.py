"""How published rules spread their tokens over the tiles of LLaVA-NeXT, each as its release does it.

    the same number from every tile   VisionZip, SCOPE and CDPruner: tiles stand in the batch, padding is chosen from as
                                      well, new lines are left out;
    one budget an image               HiRED: the base tile's class attention says how much each tile gets;
    all patches at once               DivPrune, which chooses among what the language model would see. No release of
                                      MMTok says how it treats tiles: it does the same here.

Releases fix the number of tokens per tile, so that an image of fewer tiles has fewer; here every rule has the same
number on every image, whatever its tiles. Where a tile's share is not whole, the first tiles have one more.

B images, T tiles of all of them, P patches of a tile, N the most patches of an image, K kept tokens, M merged tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from evaluation.evidence import TiledEvidence
from evaluation.peers import Greedy, assembly_of, cells_of_grid
from recoverable_llava.image_tiles import ImageTiles, TileGrids
from recoverable_llava.selection import highest, last_where_not
from recoverable_llava.token_assembly import Assembly, first_true


@dataclass(frozen=True)
class TiledAssembly(Assembly):
    """Tokens that may be other things than patches of the model's own features."""

    patches: torch.Tensor | None = None  # [B, N', C] what the indices are of, where padding may be chosen
    is_new_line: torch.Tensor | None = None  # [B, K] bool: these tokens are new lines


def chosen_patches(assembly: Assembly) -> torch.Tensor:
    """[B, N] bool: which patches are tokens as they are."""
    num_images, num_merged, num_patches = assembly.merge_weights.shape
    exists = assembly.token_mask.new_zeros(num_images, num_patches + num_merged)
    return exists.scatter(1, assembly.token_index, assembly.token_mask)[:, :num_patches]


# The same number from every tile


@dataclass(frozen=True)
class EachTile:
    """A rule that runs on every tile alone, with an equal share of the image's budget."""

    rule: Callable[..., Assembly]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, evidence: TiledEvidence, budget: int) -> TiledAssembly:
        tiles = evidence.of_tiles
        shares = equal_shares([layout.num_tiles for layout in evidence.layouts], budget)
        counts = torch.tensor(shares, device=tiles.patches.device)
        if isinstance(self.rule, Greedy):
            kept = chosen_patches(self.rule(tiles, counts, **dict(self.options)))
            return _of_images(kept, tiles.patches.new_zeros(len(kept), 0, kept.shape[1]), kept[:, :0], evidence)
        kept = torch.zeros_like(tiles.class_attention, dtype=torch.bool)
        merged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for share in sorted(set(shares)):
            some = (counts == share).nonzero()[:, 0]
            assembly = self.rule(tiles.rows(some), share, **dict(self.options))
            kept[some] = chosen_patches(assembly)
            merged[share] = some, assembly.merge_weights
        most = max(weights.shape[1] for _, weights in merged.values())
        weights = tiles.patches.new_zeros(len(kept), most, kept.shape[1], dtype=torch.float32)
        is_merged = kept.new_zeros(len(kept), most)
        for some, of_some in merged.values():
            weights[some, : of_some.shape[1]] = of_some
            is_merged[some, : of_some.shape[1]] = True
        return _of_images(kept, weights, is_merged, evidence)


def equal_shares(num_tiles: list[int], budget: int) -> list[int]:
    """[T] tokens of each tile of each image: the budget shared equally, what is left one each to the first tiles."""
    return [budget // tiles + (number < budget % tiles) for tiles in num_tiles for number in range(tiles)]


def _of_images(
    kept: torch.Tensor, weights: torch.Tensor, is_merged: torch.Tensor, evidence: TiledEvidence
) -> TiledAssembly:
    """What was chosen in tiles as tokens of images: kept patches in the order of the joined grid, then merged tokens.

    Args:
        kept: [T, P] bool.
        weights, is_merged: [T, M, P] of each tile's merged tokens, and [T, M] bool, which of them there are.
    """
    index, valid, tile = _padded_index(evidence)
    patches = evidence.of_tiles.patches.flatten(0, 1)[index]
    kept = kept.flatten()[index] & valid
    num_merged = weights.shape[1]
    if num_merged == 0:
        return TiledAssembly(**vars(assembly_of(kept)), patches=patches)
    # [B, tiles, M, N']: the weights of a tile's merged tokens over its own patches.
    most = max(layout.num_tiles for layout in evidence.layouts)
    number = torch.arange(most, device=kept.device)
    count = torch.tensor([layout.num_tiles for layout in evidence.layouts], device=kept.device)
    first = (count.cumsum(0) - count)[:, None]
    has_tile = number < count[:, None]
    of_patch = weights.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2)  # [B, M, N'], each of its own tile
    is_own = (tile[:, None] == number[:, None]) & valid[:, None]  # [B, tiles, N']
    merge_weights = (of_patch[:, None] * is_own[:, :, None]).flatten(1, 2)
    merged_mask = is_merged[torch.where(has_tile, first + number, 0)] & has_tile[:, :, None]
    return TiledAssembly(**vars(assembly_of(kept, merge_weights, merged_mask.flatten(1))), patches=patches)


def _padded_index(evidence: TiledEvidence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the patches of each image, padding among them, base tile first, then row by row of the joined tiles.

    Returns:
        [B, N'] indices into all patches of all tiles; [B, N'] bool, False behind an image's last patch; [B, N'] the
        number of the tile in its image.
    """
    padded = [
        replace(
            layout,
            rows=layout.tile_rows * layout.grid_width,
            columns=layout.tile_columns * layout.grid_width,
            top=0,
            left=0,
        )
        for layout in evidence.layouts
    ]
    grids = TileGrids.of(padded, evidence.patches.device)
    index, valid = grids.patch_index(max(layout.num_patches for layout in padded))
    return index, valid, index // grids.num_base - grids.first_tile


# One budget an image


def hired(evidence: TiledEvidence, budget: int, alpha: float = 0.5) -> Assembly:
    """HiRED (arXiv 2408.10945): class attention of the layer before the last chooses in tiles of unequal shares.

    `alpha` of the budget goes to the base tile. The other tiles share the rest by how many of the base tile's patches
    lie in their part of the picture and are among the (1 - alpha) of highest class attention in the first layer. What
    rounding leaves over goes to the best of the remaining patches. (The release cuts the base tile into stripes where
    its paper says parts of the picture, and chooses padding that it takes out again: the paper's way is the one here.)
    """
    scores, valid = evidence.previous_class_attention, evidence.valid
    num_base = evidence.layouts[0].grid_width ** 2
    tile = _tile_of_patch(evidence)
    in_base = min(int(alpha * budget), num_base)
    kept = highest(last_where_not(valid & (tile == 0), scores), in_base)

    first_layer = evidence.first_class_attention[:, :num_base]
    noticed = highest(first_layer, int((1 - alpha) * num_base))
    part = torch.stack([_part_of_base(layout) for layout in evidence.layouts]).to(scores.device)
    for number in range(1, max(layout.num_tiles for layout in evidence.layouts)):
        share = (noticed & (part == number)).sum(1) / noticed.sum(1).clamp(min=1)
        is_here = valid & (tile == number)
        count = (share * (budget - in_base)).long().minimum(is_here.sum(1))
        kept = kept | (highest(last_where_not(is_here, scores), count) & is_here)
    left = budget - kept.sum(1)
    return assembly_of(kept | highest(last_where_not(valid & ~kept, scores), left))


def hired_with_new_lines(evidence: TiledEvidence, budget: int) -> TiledAssembly:
    """HiRED with the new lines of all rows on top, as its release had it at first; they count as tokens here.

    Images with more rows than tokens keep one patch.
    """
    rows = torch.tensor([layout.rows for layout in evidence.layouts], device=evidence.patches.device)
    kept = torch.zeros_like(evidence.valid)
    for count in rows.unique().tolist():
        some = (rows == count).nonzero()[:, 0]
        kept[some] = chosen_patches(hired(_images(evidence, some), max(1, budget - count)))
    return with_new_lines(evidence, kept)


def _images(evidence: TiledEvidence, some: torch.Tensor) -> TiledEvidence:
    """The evidence of some of the images [R], indices, without that of their tiles."""
    layouts = tuple(evidence.layouts[row] for row in some.tolist())
    return TiledEvidence(**vars(evidence.rows(some)), layouts=layouts, of_tiles=evidence.of_tiles)


def _tile_of_patch(evidence: TiledEvidence) -> torch.Tensor:
    """[B, N] the number of the tile, in its image, in which each patch lies."""
    grids = TileGrids.of(evidence.layouts, evidence.patches.device)
    index, _ = grids.patch_index(evidence.patches.shape[1])
    return index // grids.num_base - grids.first_tile


@lru_cache
def _part_of_base(layout: ImageTiles) -> torch.Tensor:
    """[P] the number of the tile that shows the part of the picture in which each patch of the base tile lies."""
    along = torch.arange(layout.grid_width)
    row, column = along * layout.tile_rows // layout.grid_width, along * layout.tile_columns // layout.grid_width
    return (1 + row[:, None] * layout.tile_columns + column).flatten()


# All patches, and none of them


def keep_everything(evidence: TiledEvidence, budget: int | None) -> TiledAssembly:
    """All patches and all new lines, in place, as stock LLaVA-NeXT."""
    return with_new_lines(evidence, evidence.valid)


def with_new_lines(evidence: TiledEvidence, kept: torch.Tensor) -> TiledAssembly:
    """Kept patches [B, N] with the new lines of all rows where they stand."""
    grids = TileGrids.of(evidence.layouts, kept.device)
    counts = [layout.num_tokens for layout in evidence.layouts]
    index, is_new_line = grids.token_index(max(counts))
    number = torch.arange(index.shape[1], device=kept.device)
    exists = number < torch.tensor(counts, device=kept.device)[:, None]
    exists = exists & (is_new_line | kept.gather(1, index))
    num_tokens = exists.sum(1, keepdim=True)
    order = first_true(exists, int(num_tokens.max()))
    return TiledAssembly(
        merge_weights=kept.new_zeros(len(kept), 0, kept.shape[1], dtype=torch.float32),
        token_index=index.gather(1, order),
        token_mask=torch.arange(order.shape[1], device=kept.device) < num_tokens,
        is_new_line=is_new_line.gather(1, order),
    )


def uniform_grid(evidence: TiledEvidence, budget: int) -> Assembly:
    """The patch in the middle of each of `budget` cells that tile the base tile and the joined tiles."""
    kept = torch.zeros_like(evidence.valid, device="cpu")
    for row, layout in enumerate(evidence.layouts):
        kept[row, : layout.num_patches] = middles_of(layout, budget)
    return assembly_of(kept.to(evidence.patches.device))


def average_pooling(evidence: TiledEvidence, budget: int) -> Assembly:
    """The mean over each of `budget` cells that tile the base tile and the joined tiles."""
    cells = torch.full(evidence.valid.shape, -1)
    for row, layout in enumerate(evidence.layouts):
        cells[row, : layout.num_patches] = cells_of(layout, budget)
    cells = cells.to(evidence.patches.device)
    members = (cells[:, None] == torch.arange(budget, device=cells.device)[:, None]).float()
    weights = members / members.sum(2, keepdim=True)
    return assembly_of(torch.zeros_like(evidence.valid), weights)


@lru_cache
def cells_of(layout: ImageTiles, budget: int) -> torch.Tensor:
    """[patches of the image] the number of each patch's cell; the base tile has its share of the patches in cells too.

    Raises:
        ValueError: if the image has fewer patches.
    """
    num_base, num_patches = layout.grid_width**2, layout.num_patches
    if not 2 <= budget <= num_patches:
        raise ValueError(f"budget must be between 2 and the image's number of patches ({num_patches}), got {budget}.")
    in_base = min(num_base, max(1, round(budget * num_base / num_patches), budget - (num_patches - num_base)))
    in_base = min(in_base, budget - 1)
    base = cells_of_grid((layout.grid_width, layout.grid_width), in_base)
    return torch.cat([base, in_base + cells_of_grid((layout.rows, layout.columns), budget - in_base)])


@lru_cache
def middles_of(layout: ImageTiles, budget: int) -> torch.Tensor:
    """[patches of the image] bool: the patch in the middle of each cell."""
    members = torch.nn.functional.one_hot(cells_of(layout, budget), budget).T
    return ((members.cumsum(1) == (members.sum(1, keepdim=True) + 1) // 2) & members.bool()).any(0)
