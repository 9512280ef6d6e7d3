"""Random evidence for selection rules: what they look at, drawn for a few small images."""

import torch

from evaluation.evidence import Evidence


ROWS, COLUMNS, CHANNELS, JOINT, TOKENS = 8, 6, 16, 12, 5
PATCHES = ROWS * COLUMNS


def make_evidence(seed: int, batch_size: int = 3) -> Evidence:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    def attention(heavy: float) -> torch.Tensor:
        return (normal(PATCHES) * heavy).exp().clamp(max=1e3).softmax(-1)

    mask = torch.ones(batch_size, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False
    return Evidence(
        grid=(ROWS, COLUMNS),
        patches=normal(PATCHES, CHANNELS),
        projected=normal(PATCHES, CHANNELS + 3) + 0.5,
        keys=normal(PATCHES, CHANNELS),
        previous_keys=normal(PATCHES, CHANNELS),
        class_attention=attention(1.0),
        previous_class_attention=attention(1.2),
        undivided_class_attention=attention(0.9),
        patch_embeddings=normal(PATCHES, JOINT),
        bare_patch_embeddings=normal(PATCHES, JOINT),
        question_embedding=normal(JOINT),
        question_token_embeddings=normal(TOKENS, JOINT),
        question_token_mask=mask,
        constant_guide=normal(JOINT),
        relevance_embeds={name: normal(PATCHES, JOINT) for name in ("projected", "negated", "value")},
        relevance={name: normal(PATCHES) for name in ("projected", "negated", "value")},
    )


def row_of(evidence: Evidence, row: int) -> Evidence:
    """One image and question of a batch."""

    def cut(value):
        if isinstance(value, dict):
            return {name: cut(part) for name, part in value.items()}
        return value[row : row + 1] if isinstance(value, torch.Tensor) else value

    return Evidence(**{name: cut(value) for name, value in vars(evidence).items()})
