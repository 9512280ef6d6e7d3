"""How each rule spreads over tiles, against slow versions: one image, one tile and one patch at a time."""

import pytest
import torch
from random_evidence import SIDE, make_tiled_evidence, row_of
from torch.nn.functional import normalize

from evaluation import peers, tiled_peers
from evaluation.evidence import Evidence, TiledEvidence
from evaluation.tiled_peers import EachTile, TiledAssembly, chosen_patches
from recoverable_llava.token_assembly import gather_tokens


BUDGETS = [7, 20, 53]
PATCHES = SIDE * SIDE


def tokens_of(evidence: TiledEvidence, assembly) -> list[torch.Tensor]:
    """Of each image its tokens [K, C]; new lines are zero."""
    patches = evidence.patches if getattr(assembly, "patches", None) is None else assembly.patches
    tokens = gather_tokens(patches, assembly)
    if getattr(assembly, "is_new_line", None) is not None:
        tokens = tokens.masked_fill(assembly.is_new_line[:, :, None], 0)
    return [row[mask] for row, mask in zip(tokens, assembly.token_mask, strict=True)]


def tiles_of(evidence: TiledEvidence, image: int) -> list[Evidence]:
    """The evidence of each tile of an image."""
    rows = (evidence.of_tiles.image == image).nonzero()[:, 0]
    return [row_of(evidence.of_tiles, int(row)) for row in rows]


def raster(evidence: TiledEvidence, image: int) -> list[tuple[int, int]]:
    """(tile, patch of the tile) of all patches, base tile first, then row by row of the joined tiles."""
    layout = evidence.layouts[image]
    places = [(0, patch) for patch in range(PATCHES)]
    for y in range(layout.tile_rows * SIDE):
        for x in range(layout.tile_columns * SIDE):
            tile = 1 + y // SIDE * layout.tile_columns + x // SIDE
            places.append((tile, y % SIDE * SIDE + x % SIDE))
    return places


def held(evidence: TiledEvidence, image: int) -> list[tuple[int, int]]:
    """Those of them that hold a picture, in order."""
    layout = evidence.layouts[image]
    width = layout.tile_columns * SIDE
    grid = raster(evidence, image)[PATCHES:]
    rows, columns = range(layout.top, layout.top + layout.rows), range(layout.left, layout.left + layout.columns)
    return raster(evidence, image)[:PATCHES] + [grid[y * width + x] for y in rows for x in columns]


def shares(num_tiles: int, budget: int) -> list[int]:
    parts = [0] * num_tiles
    for number in range(budget):
        parts[number % num_tiles] += 1
    return parts


def test_patches_stand_where_they_lie():
    evidence = make_tiled_evidence(0)
    for image in range(len(evidence.layouts)):
        tiles, places = tiles_of(evidence, image), held(evidence, image)
        assert evidence.valid[image].sum() == len(places)
        for name in ("patches", "keys", "class_attention"):
            expected = torch.stack([getattr(tiles[tile], name)[0, patch] for tile, patch in places])
            assert torch.equal(getattr(evidence, name)[image, : len(places)], expected)
        expected = torch.stack([tiles[tile].relevance["value"][0, patch] for tile, patch in places])
        assert torch.equal(evidence.relevance["value"][image, : len(places)], expected)
        assert torch.equal(evidence.question_embedding[image], tiles[0].question_embedding[0])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", [peers.visionzip, peers.scope], ids=lambda rule: rule.__name__)
def test_each_tile_is_chosen_from_alone(rule, budget):
    evidence = make_tiled_evidence(1)
    found = tokens_of(evidence, EachTile(rule)(evidence, budget))
    for image, tokens in enumerate(found):
        tiles = tiles_of(evidence, image)
        kept, merged = set(), []
        for number, (tile, share) in enumerate(zip(tiles, shares(len(tiles), budget), strict=True)):
            if share == 0:
                continue
            assembly = rule(tile, share)
            kept |= {(number, patch) for patch in chosen_patches(assembly)[0].nonzero()[:, 0].tolist()}
            merged += list(assembly.merge_weights[0] @ tile.patches[0])
        expected = [tiles[tile].patches[0, patch] for tile, patch in raster(evidence, image) if (tile, patch) in kept]
        assert len(tokens) == budget
        torch.testing.assert_close(tokens, torch.stack(expected + merged), atol=1e-5, rtol=1e-5)


def most_probable(kernel: torch.Tensor, count: int) -> list[int]:
    """The greedy choice of `count` patches with the largest determinant of the kernel."""
    chosen: list[int] = []

    def determinant(patch: int) -> float:
        index = torch.tensor([*chosen, patch])
        return float(torch.linalg.det(kernel[index][:, index]))

    while len(chosen) < count:
        chosen.append(max((patch for patch in range(len(kernel)) if patch not in chosen), key=determinant))
    return chosen


@pytest.mark.parametrize("relevance", ["negated", "value"])
def test_cdpruner_stretches_relevance_over_all_tiles(relevance):
    evidence, budget = make_tiled_evidence(2), 17
    rule = EachTile(peers.cdpruner, (("relevance", relevance),))
    for image, tokens in enumerate(tokens_of(evidence, rule(evidence, budget))):
        tiles = tiles_of(evidence, image)
        every = torch.cat([tile.relevance[relevance][0] for tile in tiles]).double()
        kept = set()
        for number, (tile, share) in enumerate(zip(tiles, shares(len(tiles), budget), strict=True)):
            scores = (tile.relevance[relevance][0].double() - every.min()) / (every.max() - every.min()) + 1e-6
            features = normalize(tile.projected[0].double(), dim=-1)
            kernel = scores[:, None] * (features @ features.T) * scores[None]
            kept |= {(number, patch) for patch in most_probable(kernel, share)}
        expected = [tiles[tile].patches[0, patch] for tile, patch in raster(evidence, image) if (tile, patch) in kept]
        torch.testing.assert_close(tokens, torch.stack(expected))


def slow_hired(evidence: TiledEvidence, image: int, budget: int) -> list[int]:
    """Numbers of the image's patches."""
    layout, places = evidence.layouts[image], held(evidence, image)
    scores = evidence.previous_class_attention[image]
    of_tile = {tile: [n for n, place in enumerate(places) if place[0] == tile] for tile in range(layout.num_tiles)}

    def best(numbers: list[int], count: int) -> list[int]:
        return sorted(numbers, key=lambda n: -float(scores[n]))[:count]

    kept = best(of_tile[0], min(budget // 2, PATCHES))
    rest = budget - len(kept)
    first = evidence.first_class_attention[image, :PATCHES]
    noticed = sorted(range(PATCHES), key=lambda n: -float(first[n]))[: PATCHES // 2]
    for tile in range(1, layout.num_tiles):
        y, x = divmod(tile - 1, layout.tile_columns)
        high, wide = SIDE / layout.tile_rows, SIDE / layout.tile_columns
        rows = [n for n in noticed if y * high <= n // SIDE < (y + 1) * high]
        inside = [n for n in rows if x * wide <= n % SIDE < (x + 1) * wide]
        kept += best(of_tile[tile], int(rest * len(inside) / len(noticed)))
    kept += best([n for n in range(len(places)) if n not in kept], budget - len(kept))
    return sorted(kept)


@pytest.mark.parametrize("budget", BUDGETS)
def test_hired_equals_slow_version(budget):
    for seed in range(3):
        evidence = make_tiled_evidence(seed)
        kept = chosen_patches(tiled_peers.hired(evidence, budget))
        for image in range(len(evidence.layouts)):
            assert kept[image].nonzero()[:, 0].tolist() == slow_hired(evidence, image, budget)


@pytest.mark.parametrize("budget", [20, 53])
def test_hired_with_new_lines_counts_them(budget):
    evidence = make_tiled_evidence(3)
    assembly = tiled_peers.hired_with_new_lines(evidence, budget)
    for image, tokens in enumerate(tokens_of(evidence, assembly)):
        layout = evidence.layouts[image]
        kept = slow_hired(evidence, image, max(1, budget - layout.rows))
        expected = [evidence.patches[image, n] for n in kept if n < PATCHES]
        for row in range(layout.rows):
            first = PATCHES + row * layout.columns
            expected += [evidence.patches[image, n] for n in kept if first <= n < first + layout.columns]
            expected.append(torch.zeros_like(evidence.patches[image, 0]))
        assert len(tokens) == max(budget, layout.rows + 1)
        assert torch.equal(tokens, torch.stack(expected))


ALL_TILES = [peers.random_patches, peers.divprune, peers.scope, peers.cdpruner, peers.mmtok]
ALL_TILES += [tiled_peers.hired, tiled_peers.uniform_grid, tiled_peers.average_pooling]


def image_alone(evidence: TiledEvidence, image: int) -> TiledEvidence:
    rows = (evidence.of_tiles.image == image).nonzero()[:, 0]
    of_tiles = evidence.of_tiles.rows(rows)
    return TiledEvidence.of(
        Evidence(**vars(of_tiles) | {"image": torch.zeros_like(rows), "picked": {}}), (evidence.layouts[image],)
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", ALL_TILES, ids=lambda rule: rule.__name__)
def test_budget_is_met_with_pictures_alone_and_images_are_independent(rule, budget):
    evidence = make_tiled_evidence(4)
    assembly = rule(evidence, budget)
    assert assembly.token_mask.sum(1).tolist() == [budget] * len(evidence.layouts)
    assert not (chosen_patches(assembly) & ~evidence.valid).any()
    assert not (assembly.merge_weights * ~evidence.valid[:, None]).any()
    if rule is peers.random_patches:
        return
    for image, tokens in enumerate(tokens_of(evidence, assembly)):
        alone = image_alone(evidence, image)
        torch.testing.assert_close(tokens_of(alone, rule(alone, budget))[0], tokens, atol=1e-5, rtol=1e-5)


def test_a_single_image_needs_no_mask():
    """Of an image without others there is nothing to leave out: the rule is that of LLaVA-1.5."""
    alone = image_alone(make_tiled_evidence(5), 1)
    plain = Evidence(**{name: getattr(alone, name) for name in vars(alone.of_tiles)} | {"valid": None, "picked": {}})
    for rule in (peers.divprune, peers.scope, peers.cdpruner, peers.mmtok):
        assert torch.equal(chosen_patches(rule(alone, 15)), chosen_patches(rule(plain, 15)))


@pytest.mark.parametrize("rule", [EachTile(peers.scope), peers.divprune, peers.mmtok, EachTile(peers.cdpruner)])
def test_a_smaller_budget_is_served_from_a_larger_ones_picks(rule):
    evidence = make_tiled_evidence(6)
    rule(evidence, 50)
    anew = make_tiled_evidence(6)
    for budget in (23, 8):
        served = tokens_of(evidence, rule(evidence, budget))
        for tokens, expected in zip(served, tokens_of(anew, rule(anew, budget)), strict=True):
            assert torch.equal(tokens, expected)


def test_everything_is_every_patch_and_every_new_line():
    evidence = make_tiled_evidence(7)
    assembly = tiled_peers.keep_everything(evidence, None)
    assert isinstance(assembly, TiledAssembly)
    assert assembly.token_mask.sum(1).tolist() == [layout.num_tokens for layout in evidence.layouts]
    for image, layout in enumerate(evidence.layouts):
        lines = assembly.is_new_line[image, : layout.num_tokens].nonzero()[:, 0].tolist()
        assert lines == [PATCHES + (row + 1) * (layout.columns + 1) - 1 for row in range(layout.rows)]


@pytest.mark.parametrize("budget", [2, 7, 20, 53])
def test_cells_tile_the_base_tile_and_the_grid(budget):
    evidence = make_tiled_evidence(8)
    pooled = tiled_peers.average_pooling(evidence, budget).merge_weights
    kept = chosen_patches(tiled_peers.uniform_grid(evidence, budget))
    for image, layout in enumerate(evidence.layouts):
        weights = pooled[image, :, : layout.num_patches]
        assert torch.equal((weights > 0).sum(0), torch.ones(layout.num_patches, dtype=torch.long))
        in_base = (weights[:, :PATCHES] > 0).any(1)
        assert not (in_base & (weights[:, PATCHES:] > 0).any(1)).any()
        assert abs(int(in_base.sum()) - budget * PATCHES / layout.num_patches) <= 1
        assert (weights[:, kept[image, : layout.num_patches]] > 0).sum(0).tolist() == [1] * budget
    with pytest.raises(ValueError, match="budget must be between 2 and the image's number of patches"):
        tiled_peers.cells_of(evidence.layouts[0], 1)
