"""What the recovery reads off CLIP's vision tower: class attention, keys, and embeddings to compare with a question.

The tower itself runs as in stock LLaVA, once, on SDPA or FlashAttention. What it does not give away is computed again
from the input of one layer, for the class token's row alone. That happens *inside a call of that layer*, so that
whatever gathers, moves or loads the layer's weights around its calls (FSDP, DeepSpeed, offloading) sees this one too.

I images, N patches, C channels, D size of CLIP's joint embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class ReadableEncoderLayer(CLIPEncoderLayer):
    """A CLIP layer that can also be read: `layer(states, read=function)` returns `function(layer, states)`."""

    is_readable = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        read: Callable[[Any, torch.Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if read is not None:
            return read(self, hidden_states)
        return super().forward(hidden_states, attention_mask, **kwargs)


def read_layer(layer: Any, hidden_states: torch.Tensor, read: Callable[[Any, torch.Tensor], Any]) -> Any:
    """`read(layer, hidden_states)` inside a call of the layer; a layer of a foreign tower is read as it is.

    So is one that is being compiled: transformers' hooks on a layer do not compile outside the tower's own forward.
    """
    if getattr(layer, "is_readable", False) and not torch.compiler.is_compiling():
        return layer(hidden_states, read=read)
    return read(layer, hidden_states)


def class_attention(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the class token over the patches [I, N] float32, mean over heads, and the patches' keys [I, N, C].

    Args:
        layer: a CLIP layer.
        hidden_states: [I, 1 + N, C] its input.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    keys = attention.k_proj(normed)
    query = attention.q_proj(normed[:, :1])
    keys_per_head = keys.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    query_per_head = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    logits = (query_per_head @ keys_per_head.transpose(2, 3)).squeeze(2) * attention.scale  # [I, heads, 1 + N]
    scores = logits.softmax(-1, dtype=torch.float32).mean(1)
    return scores[:, 1:], keys[:, 1:]


def without_attention(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """[I, N, C] a CLIP layer with its attention replaced by the identity: MaskCLIP (Zhou et al., ECCV 2022)."""
    values = layer.self_attn.v_proj(layer.layer_norm1(hidden_states))
    hidden_states = hidden_states + layer.self_attn.out_proj(values)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def relevance_embeddings(
    encoder: Any, visual_projection: nn.Module, hidden_states: tuple[torch.Tensor, ...], text_relevance: str
) -> torch.Tensor:
    """[I, N, D] float32: the dot product of a patch's embedding and a question's, both unit norm, is its relevance.

    Args:
        encoder: CLIP's vision transformer.
        visual_projection: into the joint space.
        hidden_states: of all layers, each [I, 1 + N, C].
        text_relevance: "projected", the last layer's patches (the paper); "negated", minus those of the layer before
            (TRIM and CDPruner, for CLIP ViT-L/14-336); "value", the last layer without its attention (MaskCLIP).
    """
    last = len(encoder.encoder.layers)
    if text_relevance == "projected":
        states = hidden_states[last][:, 1:]
    elif text_relevance == "negated":
        states = hidden_states[last - 1][:, 1:]
    else:
        states = read_layer(encoder.encoder.layers[-1], hidden_states[last - 1][:, 1:], without_attention)
    embeds = visual_projection(encoder.post_layernorm(states)).float()
    embeds = nn.functional.normalize(embeds, dim=-1)
    return -embeds if text_relevance == "negated" else embeds
