"""Tiny stock checkpoints with random weights, made on the fly: what a LLaVA and its CLIP look like on disk."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil


IMAGE_SIZE, PATCH_SIZE = 84, 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2  # 36
PINPOINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]
FAMILIES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, CLIPImageProcessorPil, {}),
    "llava_next": (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        LlavaNextImageProcessorPil,
        {"image_grid_pinpoints": PINPOINTS},
    ),
}
LANGUAGE_MODELS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
# Local outlier factors need fewer neighbours than there are patches.
RECOVERY = {
    "visual_lof_neighbors": 6,
    "text_lof_neighbors": 6,
    "merge_lof_neighbors": 4,
    "merge_neighbors": 4,
    # Random features are all far from each other.
    "novelty_threshold": 0.4,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = (
    "USER : ASSISTANT what is the colour of cat dog red blue green yes no where left right how many are there a photo "
    "this picture describe please tell me about it and then why ? . , 0 1 2 3 4 5 6 7 8 9"
)


def llava_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def save_tiny_clip(folder: str | Path, seed: int = 0, hidden_size: int = 32) -> None:
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=vision_config(hidden_size),
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    _spread_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_tiny_llava(
    folder: str | Path,
    clip: str | Path,
    seed: int = 1,
    language_model: str = "llama",
    family: str = "llava",
    **config_settings: object,
) -> None:
    """A stock LLaVA whose vision tower is that of the CLIP checkpoint `clip`."""
    config_class, model_class, processor_class, image_processor_class, tiling = FAMILIES[family]
    tokenizer = llava_tokenizer()
    clip_model = CLIPModel.from_pretrained(clip)
    text_config = LANGUAGE_MODELS[language_model](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = config_class(
        vision_config=clip_model.config.vision_config,
        text_config=text_config,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=NUM_PATCHES,
        **tiling,
        **config_settings,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    _spread_weights(model)
    model.model.vision_tower.load_state_dict(clip_model.vision_model.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor_class(
        image_processor=image_processor_class(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **tiling
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def vision_config(hidden_size: int = 32) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 16,
    }


@torch.no_grad()
def _spread_weights(model: torch.nn.Module) -> None:
    """Larger random weights than the usual initialisation, so that different inputs give different answers."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
