"""What a selection rule may look at: one batch of images and questions, as the vision and text towers see them.

Published rules of token selection differ in which layer, which keys and which embeddings they read. All of it is
gathered here once per batch, so that a rule is a pure function of this record and of a budget.

B images, N patches, C channels of the vision tower, D channels of the language model, J of the joint CLIP space,
T question tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Evidence:
    grid: tuple[int, int]  # rows and columns of patches
    patches: torch.Tensor  # [B, N, C] the features that LLaVA takes (layer -2), without the class token
    projected: torch.Tensor  # [B, N, D] the same through LLaVA's projector
    keys: torch.Tensor  # [B, N, C] attention keys of the last layer
    previous_keys: torch.Tensor  # [B, N, C] attention keys of the layer before it
    class_attention: torch.Tensor  # [B, N] of the last layer, mean over heads
    previous_class_attention: torch.Tensor  # [B, N] of the layer before it, mean over heads
    undivided_class_attention: torch.Tensor  # [B, N] of the last layer, all heads taken as one
    patch_embeddings: torch.Tensor  # [B, N, J] layer -2 through post_layernorm and visual_projection
    bare_patch_embeddings: torch.Tensor  # [B, N, J] the last layer through visual_projection alone
    question_embedding: torch.Tensor  # [B, J] pooled and projected
    question_token_embeddings: torch.Tensor  # [B, T, J] every token of the question, projected
    question_token_mask: torch.Tensor  # [B, T] bool: the question's own tokens
    constant_guide: torch.Tensor  # [B, J] the system prompt at the last padded position, projected
    relevance_embeds: dict[str, torch.Tensor]  # name of a text_relevance of the model -> [B, N, J]
    relevance: dict[str, torch.Tensor]  # the same times the question's embedding -> [B, N]
