"""The small LLaVA and its CLIP half, made of stock transformers modules, and the losses of training.

The modules are the stock ones, so that the exported folders are stock checkpoints; only the training pass runs their
layers one after the other, because the stock forward returns hidden states through hooks that do not compile.

Three losses:
- answers: cross entropy of the answers in a conversation behind the image;
- contrastive: captions, short captions and questions against the images of the batch, several images may fit a text;
- dense: each visual token, as the language model receives it, against the language model's own embeddings of the words
  for what its patch shows. No head to throw away, and looking an object up by its name becomes a comparison of like
  with like.

The vision tower always sees all patches and the language model always sees all visual tokens.

Shapes: B images, N patches, C channels of the vision tower, D of the language model, T text tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from .data import MAXIMUM_TURNS
from .language import IMAGE_TOKEN, WORD_END, dense_words, language_tokenizer, question_tokenizer
from .render import IGNORED, patch_targets
from .render import render as render_images
from .scenes import IMAGE_SIZE
from .vocabulary import NOTHING


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as its image processor has them
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAXIMUM_LOGIT_SCALE = 100.0
LONGEST_PROMPT = 2048


@dataclass
class ModelSize:
    """The sizes that the recipe lets one choose; the defaults are the checkpoint's."""

    patch_size: int = 14
    vision_layers: int = 8
    vision_width: int = 256
    vision_heads: int = 4
    text_layers: int = 4
    text_width: int = 192
    text_heads: int = 3
    projection: int = 192
    language_layers: int = 6
    language_width: int = 320
    language_heads: int = 5
    language_inner: int = 896


SMOKE_SIZE = ModelSize(56, 2, 32, 2, 1, 32, 2, 32, 2, 32, 2, 64)


def vision_config(size: ModelSize) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=size.patch_size,
        projection_dim=size.projection,
    )


def text_config(size: ModelSize) -> CLIPTextConfig:
    tokenizer = question_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=size.projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def language_config(size: ModelSize, longest: int) -> LlamaConfig:
    """The language model's configuration for prompts of up to `longest` tokens."""
    tokenizer = language_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.language_width,
        intermediate_size=size.language_inner,
        num_hidden_layers=size.language_layers,
        num_attention_heads=size.language_heads,
        num_key_value_heads=size.language_heads,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_settings(size: ModelSize) -> dict[str, Any]:
    """What the configurations of both families have in common, beside the language model's."""
    return {
        "vision_config": vision_config(size),
        "image_token_index": language_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": (IMAGE_SIZE // size.patch_size) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
    }


def llava_config(size: ModelSize) -> LlavaConfig:
    return LlavaConfig(text_config=language_config(size, LONGEST_PROMPT), **llava_settings(size))


def visual_positions(batch: int, patches: int, start: int, text: int, device: torch.device | str) -> Tensor:
    """Position ids [B, start + N + T] of the language model in training.

    Half of the rows count as usual. In three of ten the visual tokens stand closer together, as if the image were
    smaller; in two of ten their positions are shuffled as well. No token is dropped, but where an object is must then
    be read from the visual tokens, not from their place in the prompt.
    """
    draw = torch.rand(batch, 1, device=device)
    step = torch.where(draw < 0.5, 1.0, 0.05 ** torch.rand(batch, 1, device=device))
    order = torch.arange(patches, device=device, dtype=torch.float32).expand(batch, -1)
    shuffled = torch.rand(batch, patches, device=device).argsort(1).float()
    visual = start + step * torch.where(draw < 0.8, order, shuffled)
    before = torch.arange(start, device=device, dtype=torch.float32).expand(batch, -1)
    after = start + step * patches + torch.arange(text, device=device, dtype=torch.float32)
    return torch.cat([before, visual, after], 1)


class TrainingModel(nn.Module):
    """LLaVA, the question tower and the CLIP projections, with the training losses."""

    views_without_place = False  # whether an image may be a part of a picture, which shows no place in it

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.llava = self.build_llava()
        self.question_tower = CLIPTextModelWithProjection(text_config(size))
        self.visual_projection = nn.Linear(size.vision_width, size.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        nn.init.normal_(self.visual_projection.weight, std=size.vision_width**-0.5)
        self._initialise_language()
        vocabulary = language_tokenizer().get_vocab()
        groups = dense_words(self.views_without_place)
        self.group_sizes = [len(words) for words in groups]
        self.group_nothing = [len(words) - (words[-1] == NOTHING + WORD_END) for words in groups]
        words = torch.tensor([vocabulary[word] for group in groups for word in group])
        self.render = render_images
        self.register_buffer("dense_ids", words, persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def build_llava(self) -> nn.Module:
        return LlavaForConditionalGeneration(llava_config(self.size))

    def _initialise_language(self) -> None:
        """Embeddings of unit length, and keys that start out equal to queries: tokens first attend to their like
        ("mimetic initialisation", arXiv 2305.09828), which is the look-up by name that most questions need."""
        language = self.llava.model.language_model
        nn.init.normal_(language.embed_tokens.weight, std=self.size.language_width**-0.5)
        for layer in language.layers:
            with torch.no_grad():
                nn.init.normal_(layer.self_attn.q_proj.weight, std=self.size.language_width**-0.5)
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)

    def compile_parts(self) -> None:
        """Compiles the layers (one graph for all layers of a tower), the renderer and the dense loss."""
        text = getattr(self.question_tower.text_model, "text_model", self.question_tower.text_model)
        for tower in (self.llava.model.vision_tower.encoder, self.llava.model.language_model, text.encoder):
            for layer in tower.layers:
                layer.compile()
        self.render = torch.compile(self.render)
        self.dense_loss = torch.compile(self.dense_loss)

    def vision(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """LLaVA's visual features [B, N, C] (layer -2, no class token) and CLIP's image embedding [B, P]."""
        tower = self.llava.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings((images - self.mean) / self.std))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        features = hidden[:, 1:]
        last = tower.encoder.layers[-1](hidden, None)
        return features, self.visual_projection(tower.post_layernorm(last[:, 0]))

    def texts(self, ids: Tensor) -> Tensor:
        """Text embeddings [B, P] of right-padded token ids [B, S]."""
        tower = getattr(self.question_tower.text_model, "text_model", self.question_tower.text_model)
        hidden = tower.embeddings(input_ids=ids)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None, is_causal=True)
        end = (ids == self.question_tower.config.eos_token_id).int().argmax(1)
        pooled = tower.final_layer_norm(hidden)[torch.arange(len(ids), device=ids.device), end]
        return self.question_tower.text_projection(pooled)

    def language(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states [B, L, D] of the causal language model."""
        language = self.llava.model.language_model
        rotary = language.rotary_emb(embeddings, positions)
        hidden = embeddings
        for layer in language.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return language.norm(hidden)

    def dense_loss(self, visual_tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the words for what each patch shows, and accuracies [7] on the patches that show something."""
        embeddings = functional.normalize(
            self.llava.model.language_model.embed_tokens.weight[self.dense_ids].float(), dim=1
        )
        width = visual_tokens.shape[-1]
        directions = functional.rms_norm(visual_tokens.float(), (width,))
        logits = 1.5 * directions.flatten(0, 1) @ embeddings.T
        loss, accuracies = logits.new_zeros(()), []
        start = 0
        for count, nothing, target in zip(
            self.group_sizes, self.group_nothing, targets.flatten(0, 1).unbind(-1), strict=True
        ):
            part = logits[:, start : start + count]
            start += count
            each = functional.cross_entropy(part, target, ignore_index=IGNORED, reduction="none")
            shows = (target >= 0) & (target != nothing)
            empty = target == nothing
            loss = (
                loss + (each * shows).sum() / shows.sum().clamp_min(1) + (each * empty).sum() / empty.sum().clamp_min(1)
            )
            accuracies.append(((part.argmax(1) == target) & shows).sum() / shows.sum().clamp_min(1))
        return loss / len(self.group_sizes), torch.stack(accuracies)

    def contrastive_loss(
        self, images: Tensor, texts: Tensor, caption_facts: Tensor, image_facts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of texts [B, E, P] against images [I, P] where several images may fit, and top-1 of long captions.

        Args:
            caption_facts: what each text says, [B, E, F].
            image_facts: what each image shows, [I, F].
        """
        images, texts = functional.normalize(images.float(), dim=-1), functional.normalize(texts.float(), dim=-1)
        scale = self.logit_scale.exp().clamp_max(MAXIMUM_LOGIT_SCALE)
        fits = torch.einsum("bef,if->bei", caption_facts.float(), (~image_facts).float()) < 0.5
        logits = scale * torch.einsum("bep,ip->bei", texts, images)
        share = fits.float() / fits.sum(-1, keepdim=True).clamp_min(1)
        to_images = -(share * logits.log_softmax(-1)).sum(-1)
        has_image = fits.any(-1)
        to_images = (to_images * has_image).sum() / has_image.sum()
        long_fits, long_logits = fits[:, 0].T, logits[:, 0].T
        share = long_fits.float() / long_fits.sum(-1, keepdim=True).clamp_min(1)
        to_texts = -(share * long_logits.log_softmax(-1)).sum(-1).sum() / long_fits.any(-1).sum()
        top = logits[:, 0].argmax(-1)
        retrieved = fits[:, 0].gather(1, top[:, None]).float().mean()
        return (to_images + to_texts) / 2, retrieved

    def answers(
        self, batch: dict[str, Tensor], visual_tokens: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss of the answers behind visual tokens [B, N, D], and which turns are right [B, Q].

        Args:
            positions: [B, L] of the prompt, or None to count as usual.
        """
        images, text = len(visual_tokens), batch["text"].shape[1]
        stream = torch.bfloat16 if torch.is_autocast_enabled(visual_tokens.device.type) else torch.float32
        embed = self.llava.model.language_model.embed_tokens
        prefix = embed(batch["prefix"]).expand(images, -1, -1)
        embeddings = torch.cat([prefix.to(stream), visual_tokens.to(stream), embed(batch["text"]).to(stream)], 1)
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device).float().expand(images, -1)
        hidden = self.language(embeddings, positions)[:, -text:]
        logits = self.llava.lm_head(hidden).float()
        each = functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(batch["labels"])
        loss = (each * batch["weights"]).sum() / batch["weights"].sum()
        wrong = (logits.argmax(-1) != batch["labels"]) & (batch["turn"] >= 0)
        turn_wrong = torch.zeros(images, MAXIMUM_TURNS, device=logits.device)
        turn_wrong.scatter_add_(1, batch["turn"].clamp_min(0), wrong.float())
        return loss, turn_wrong == 0

    def forward(self, batch: dict[str, Tensor], constants: dict[str, Tensor], jitter: bool = True) -> dict[str, Tensor]:
        """Losses and measures of one batch of `data.BatchMaker`."""
        with torch.no_grad():
            images = self.render(batch, constants)
            targets, _ = patch_targets(batch, constants, IMAGE_SIZE // self.size.patch_size)
        features, image_embeddings = self.vision(images)
        visual_tokens = self.llava.model.multi_modal_projector(features)
        dense, dense_accuracy = self.dense_loss(visual_tokens, targets)
        captions = batch["captions"].flatten(0, 1)
        text_embeddings = self.texts(captions).unflatten(0, batch["captions"].shape[:2])
        contrastive, retrieved = self.contrastive_loss(
            image_embeddings, text_embeddings, batch["caption_facts"], batch["scene_facts"]
        )
        start, text = batch["prefix"].shape[1], batch["text"].shape[1]
        positions = visual_positions(len(images), visual_tokens.shape[1], start, text, images.device)
        answers, turn_right = self.answers(batch, visual_tokens, positions if jitter else None)
        return {
            "answers": answers, "contrastive": contrastive, "dense": dense, "dense_accuracy": dense_accuracy,
            "retrieved": retrieved, "turn_right": turn_right,
        }  # fmt: skip


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
