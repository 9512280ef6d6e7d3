"""How LLaVA-NeXT's images lie on their tiles: as in stock's own code, for any size and any resolutions."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import HostReads
from transformers import LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from recoverable_llava.image_tiles import ImageTiles, TileGrids


PATCH_SIZE = 14
NEW_LINE = -1


def random_images(seed, number=100):
    """(height, width) of images, pinpoints, and patches along a side of a tile: of a checkpoint one cannot know."""
    random = np.random.default_rng(seed)
    grid_width = int(random.integers(2, 8))
    tile_size = grid_width * PATCH_SIZE
    shapes = [(rows, columns) for rows in range(1, 5) for columns in range(1, 5)]
    chosen = random.choice(len(shapes), size=random.integers(1, 7), replace=False)
    pinpoints = [[shapes[index][0] * tile_size, shapes[index][1] * tile_size] for index in chosen]
    shorter = np.exp(random.uniform(0, np.log(2000), number))
    ratio = np.exp(random.normal(0, 1.5, number))
    sizes = np.stack([shorter, shorter * ratio], axis=1).round().astype(int).clip(1, 20_000)
    return [(int(height), int(width)) for height, width in sizes], pinpoints, grid_width


def tiles_of(sizes, pinpoints, grid_width):
    return [ImageTiles.of(size, pinpoints, grid_width * PATCH_SIZE, grid_width) for size in sizes]


def packed_by_stock(sizes, pinpoints, grid_width):
    """Of each image the patches that its tokens are, numbered over the tiles of all images; -1 for a new line."""
    tile_size = grid_width * PATCH_SIZE
    vision_config = SimpleNamespace(image_size=tile_size, patch_size=PATCH_SIZE)
    config = SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=vision_config)
    numbers, first = [], 0
    for size in sizes:
        num_patches = image_size_to_num_patches(size, pinpoints, tile_size) * grid_width**2
        numbers.append(torch.arange(first, first + num_patches).view(-1, grid_width**2, 1))
        first += num_patches
    packed, counts = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), numbers, sizes, "default", image_newline=torch.tensor([NEW_LINE])
    )
    assert counts.tolist() == [len(each) for each in packed]
    return [each[:, 0] for each in packed]


def counted_by_stock(sizes, pinpoints, grid_width):
    """Placeholders that stock's processor writes for each image."""
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
    )
    processor._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, processor)
    tile_size = grid_width * PATCH_SIZE
    return [LlavaNextProcessor._get_number_of_features(processor, *size, tile_size, tile_size) - 1 for size in sizes]


# ------------------------------------------------------------------------------------------------------ as stock has it


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_stock(seed):
    sizes, pinpoints, grid_width = random_images(seed)
    tiles = tiles_of(sizes, pinpoints, grid_width)
    assert [each.num_tokens for each in tiles] == counted_by_stock(sizes, pinpoints, grid_width)
    grids = TileGrids.of(tiles, torch.device("cpu"))
    patch_index, valid = grids.patch_index(max(each.num_patches for each in tiles))
    token_index, is_new_line = grids.token_index(max(each.num_tokens for each in tiles))
    tokens = torch.where(is_new_line, NEW_LINE, patch_index.gather(1, token_index))
    for row, (each, expected) in enumerate(zip(tiles, packed_by_stock(sizes, pinpoints, grid_width), strict=True)):
        assert tokens[row, : each.num_tokens].tolist() == expected.tolist(), sizes[row]
        assert patch_index[row, valid[row]].tolist() == expected[expected != NEW_LINE].tolist()
        assert int(valid[row].sum()) == each.num_patches and not valid[row, each.num_patches :].any()
        assert int(is_new_line[row].sum()) == each.rows


def test_random_images_hold_every_kind():
    """What the comparison above rests on: padding on either side, none, and images without rows or columns."""
    tiles = [each for seed in range(8) for each in tiles_of(*random_images(seed))]
    assert {each.tile_rows for each in tiles} == {each.tile_columns for each in tiles} == {1, 2, 3, 4}
    for kind in (
        lambda each: each.top > 0,
        lambda each: each.left > 0,
        lambda each: (
            each.rows == each.tile_rows * each.grid_width and each.columns == each.tile_columns * each.grid_width
        ),
        lambda each: each.rows == 0,
        lambda each: each.columns == 0,
    ):
        assert sum(map(kind, tiles)) > 3


def test_an_image_alone_is_indexed_as_in_a_batch():
    sizes, pinpoints, grid_width = random_images(0, 20)
    tiles = tiles_of(sizes, pinpoints, grid_width)
    together, _ = TileGrids.of(tiles, torch.device("cpu")).patch_index(max(each.num_patches for each in tiles))
    first_tile = 0
    for row, each in enumerate(tiles):
        alone, valid = TileGrids.of([each], torch.device("cpu")).patch_index(each.num_patches)
        assert valid.all()
        assert torch.equal(alone[0] + first_tile * grid_width**2, together[row, : each.num_patches])
        first_tile += each.num_tiles


def test_indices_stay_inside():
    """Also behind an image's end, where they mean nothing."""
    sizes, pinpoints, grid_width = random_images(3)
    tiles = tiles_of(sizes, pinpoints, grid_width)
    grids = TileGrids.of(tiles, torch.device("cpu"))
    index, _ = grids.patch_index(max(each.num_patches for each in tiles))
    assert index.min() >= 0 and index.max() < sum(each.num_tiles for each in tiles) * grid_width**2
    index, _ = grids.token_index(max(each.num_tokens for each in tiles))
    assert index.min() >= 0
    assert (index < torch.tensor([each.num_patches for each in tiles])[:, None]).all()


def test_tiles_are_counted_without_reading_a_tensor():
    """Wherever a user's tensors are made by default: the device need not be waited for."""
    images = random_images(4)
    expected = tiles_of(*images)
    with torch.device("meta"), HostReads() as host:
        assert tiles_of(*images) == expected
    assert host.names == []


# ----------------------------------------------------------------------------------------------------------- neighbours


def slow_highest_around(values, tiles):
    """Of one image [kinds, N], one patch at a time, on a picture of the base tile and one of the joined tiles."""
    result = torch.empty_like(values)
    start = 0
    for height, width in ((tiles.grid_width, tiles.grid_width), (tiles.rows, tiles.columns)):
        for row in range(height):
            for column in range(width):
                around = [
                    start + y * width + x
                    for y in range(max(row - 1, 0), min(row + 2, height))
                    for x in range(max(column - 1, 0), min(column + 2, width))
                ]
                result[:, start + row * width + column] = values[:, around].amax(1)
        start += height * width
    return result


@pytest.mark.algorithm
@pytest.mark.parametrize("seed", range(4))
def test_the_highest_around_a_patch(seed):
    sizes, pinpoints, grid_width = random_images(seed, 25)
    tiles = tiles_of(sizes, pinpoints, grid_width)
    most = max(each.num_patches for each in tiles)
    values = torch.randn(len(tiles), 2, most, generator=torch.Generator().manual_seed(seed))
    for row, each in enumerate(tiles):
        values[row, :, each.num_patches :] = torch.inf  # what is no patch must lend nothing
    before = values.clone()
    found = TileGrids.of(tiles, torch.device("cpu")).highest_around()(values)
    assert found.shape == values.shape and torch.equal(values, before)
    for row, each in enumerate(tiles):
        own = values[row, :, : each.num_patches]
        assert torch.equal(found[row, :, : each.num_patches], slow_highest_around(own, each)), sizes[row]
