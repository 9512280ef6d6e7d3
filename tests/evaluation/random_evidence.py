"""Random evidence for selection rules: what they look at, drawn for a few small images."""

from dataclasses import fields, replace

import tiny
import torch

from evaluation.evidence import OF_QUESTIONS, Evidence, TiledEvidence
from recoverable_llava.image_tiles import ImageTiles


ROWS, COLUMNS, CHANNELS, JOINT, TOKENS = 8, 6, 16, 12, 5
PATCHES = ROWS * COLUMNS


# Height and width: of three and of five tiles, with and without padding, narrow ones.
SIZES = [(84, 84), (200, 180), (100, 300), (400, 90)]
SIDE = tiny.IMAGE_SIZE // tiny.PATCH_SIZE


def make_evidence(seed: int, batch_size: int = 3, grid: tuple[int, int] = (ROWS, COLUMNS)) -> Evidence:
    num_patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    def attention(heavy: float) -> torch.Tensor:
        return (normal(num_patches) * heavy).exp().clamp(max=1e3).softmax(-1)

    mask = torch.ones(batch_size, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    return Evidence(
        grid=grid,
        patches=normal(num_patches, CHANNELS),
        projected=normal(num_patches, CHANNELS + 3) + 0.5,
        keys=normal(num_patches, CHANNELS),
        previous_keys=normal(num_patches, CHANNELS),
        class_attention=attention(1.0),
        previous_class_attention=attention(1.2),
        first_class_attention=attention(1.1),
        undivided_class_attention=attention(0.9),
        patch_embeddings=normal(num_patches, JOINT),
        bare_patch_embeddings=normal(num_patches, JOINT),
        question_embedding=normal(JOINT),
        question_token_embeddings=normal(TOKENS, JOINT),
        question_token_mask=mask,
        constant_guide=normal(JOINT),
        relevance_embeds={name: normal(num_patches, JOINT) for name in ("projected", "negated", "value")},
        relevance={name: normal(num_patches) for name in ("projected", "negated", "value")},
    )


def make_tiled_evidence(seed: int) -> TiledEvidence:
    """Images of `SIZES`, each with a question of its own."""
    layouts = tuple(ImageTiles.of(size, tiny.PINPOINTS, tiny.IMAGE_SIZE, SIDE) for size in SIZES)
    image = torch.tensor([number for number, layout in enumerate(layouts) for _ in range(layout.num_tiles)])
    of_tiles = make_evidence(seed, len(image), (SIDE, SIDE))
    of_images = {each.name: getattr(of_tiles, each.name)[image] for each in fields(Evidence) if each.name in OF_TEXTS}
    return TiledEvidence.of(replace(of_tiles, **of_images, image=image), layouts)


OF_TEXTS = [name for name in OF_QUESTIONS if name != "image"]


def row_of(evidence: Evidence, row: int) -> Evidence:
    """One image and question of a batch."""

    return evidence.rows(torch.tensor([row]))
