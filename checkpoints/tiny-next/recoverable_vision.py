"""The vision half: towers, question, selection, projector. From pixels and a question to visual tokens.

Shared by all families, and usable without a language model: serving engines, which bring their own, run this half alone
(`RecoverableLlavaVisionModel`). In order:

    get_vision_features    one pass of the vision tower: patches, class attention, keys;
    embed_questions        the questions in CLIP's joint space;
    score                  relevance of every patch to its question;
    select                 which patches stay (novelty_selection.py or paper_selection.py);
    assemble, project      the visual tokens, in the language model's space (token_assembly.py).

`recover` is these in order. A family adds what differs: how many placeholders an image has, its vision features, which
patches are neighbours. To choose tokens in another way, override `select` and `assemble`.

I images, R questions, N patches, C channels, K kept tokens, T question tokens, D size of an embedding.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .clip_scores import ReadableEncoderLayer, class_attention, read_layer, relevance_embeddings
from .novelty_selection import cosine_distance, select_by_novelty
from .paper_selection import select_by_outliers
from .recovery_settings import RecoverySettings
from .selection import Selection, join
from .token_assembly import Assembly, assemble_tokens, gather_tokens
from .transformers_names import encoder_of, register_checkpoint_layouts, warn_if_untested


logger = logging.get_logger(__name__)

# Whether a stock forward is running in this thread: that asks `get_image_features` for the features of all patches, and
# has no way to say so.
_is_stock_forward: ContextVar[bool] = ContextVar("recoverable_llava_stock_forward", default=False)

# Of patches, for which a selection compares every two: 2 ** 25 distances are 128 MiB, a few images of five tiles.
PAIRS_AT_ONCE = 2**25

# What this adds to a model. Nothing of it is ever trained: a selection has no gradient.
FROZEN = ("question_tower", "visual_projection")


@dataclass(frozen=True)
class VisionFeatures:
    """What one pass of the vision tower yields for compression; reusable for any number of questions."""

    patches: torch.Tensor  # [I, N, C] features that LLaVA's projector takes
    class_tokens: torch.Tensor | None  # [I, 1, C] under the "full" strategy
    visual_scores: torch.Tensor  # [I, N] float32, class attention
    keys: torch.Tensor  # [I, N, C] attention keys
    relevance_embeds: torch.Tensor  # [I, N, D] float32: their dot product with a question's embedding is the relevance
    last_hidden_state: Any = None  # [I, 1 + N, C] of the tower, as stock returns it
    valid: torch.Tensor | None = None  # [I, N] bool, False for patches that hold no picture; None means all True
    distance: Any = None  # [I, N, N] float32 between patches, once `with_distance` has added it
    tiles: Any = None  # of each image, in families that cut images into tiles (image_tiles.py)

    @property
    def num_class_tokens(self) -> int:
        return 0 if self.class_tokens is None else 1

    def rows(self, some: slice) -> "VisionFeatures":
        """The features of some of the images, without what the tower returned for all."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        of_images = {name: value[some] for name, value in given.items() if value is not None}
        return replace(self, **of_images | {"last_hidden_state": None})

    def with_class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [I, K, C] behind the class token, where the strategy is "full"."""
        return tokens if self.class_tokens is None else torch.cat([self.class_tokens, tokens], dim=1)


@dataclass(frozen=True)
class Questions:
    """The questions of a batch, one a prompt (or an image, where there is no prompt)."""

    embeds: torch.Tensor  # [R, D] float32 unit norm
    present: torch.Tensor  # [R] bool: False where there is none

    def of_images(self, row_of_image: torch.Tensor) -> "Questions":
        """One row for each image, of the prompt that it stands in."""
        row_of_image = row_of_image.to(self.embeds.device)
        return Questions(self.embeds[row_of_image], self.present[row_of_image])


@dataclass(frozen=True)
class ScoredImages:
    """Images with the question that each is asked: all that a selection goes by."""

    vision: VisionFeatures
    text_scores: torch.Tensor | None  # [I, N] relevance to the question; None where no image has a question
    has_question: torch.Tensor | None  # [I] bool

    def rows(self, some: slice) -> "ScoredImages":
        """Some of the images."""
        scores = (None if value is None else value[some] for value in (self.text_scores, self.has_question))
        return ScoredImages(self.vision.rows(some), *scores)


@dataclass(frozen=True)
class Recovery:
    """What became of each image's patches, from `recover_tokens`."""

    selection: Selection
    assembly: Assembly
    visual_scores: torch.Tensor  # [I, N]
    text_scores: torch.Tensor | None  # [I, N]
    tiles: Any = None  # of each image, in families that cut images into tiles (image_tiles.py)

    @property
    def num_uncompressed(self) -> list[int]:
        """How many tokens each image has without compression, new lines included, its class token not counted."""
        if self.tiles is None:
            num_images, num_patches = self.visual_scores.shape
            return [num_patches] * num_images
        return [tiles.num_tokens for tiles in self.tiles]


class RecoverableVisionMixin(nn.Module):
    """The steps above, for a model that has `vision_tower`, `multi_modal_projector` and a config of its family."""

    _no_split_modules = [ReadableEncoderLayer.__name__]
    stock_name: str  # of the stock class whose checkpoints these are
    config: Any
    vision_tower: nn.Module
    multi_modal_projector: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # transformers looks the layouts of checkpoints up by the class's name.
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "stock_name"):
            register_checkpoint_layouts(cls.__name__, like=cls.stock_name)

    def add_recovery(self) -> None:
        """Build what stock lacks; for the end of a family's `__init__`."""
        warn_if_untested()
        config = self.config
        encoder = encoder_of(self.vision_tower).encoder
        encoder.layers = nn.ModuleList(ReadableEncoderLayer(self.vision_tower.config) for _ in encoder.layers)
        question_tower = CLIPTextModelWithProjection._from_config(config.question_config)
        visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.question_config.projection_dim, bias=False
        )
        self.question_tower = FrozenLinear.replace_in(question_tower)
        self.visual_projection = FrozenLinear.replace_in(visual_projection)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        for name in FROZEN:
            getattr(self, name).requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """As in torch; what is never trained stays frozen, also behind `from_pretrained`, which thaws what it loads."""
        self.freeze()
        return super().train(mode)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, but what is never trained goes by a number.

        Tools that adapt layers by their names (PEFT, and scripts around it) then find those alone which a loss reaches.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self.named_children():
            inner = f"{prefix}.{name}" if prefix else name
            if name in FROZEN:
                for number, (true, module) in enumerate(child.named_modules(memo, inner, remove_duplicate)):
                    yield NumberedName(f"{inner}.{number}", true) if number else true, module
            else:
                yield from child.named_modules(memo, inner, remove_duplicate)

    # -------------------------------------------------------------------------------------------- what a family decides

    def around(self, vision: VisionFeatures) -> Callable[[torch.Tensor], torch.Tensor]:
        """The highest value of [I, kinds, N] among each patch and its neighbours."""
        raise NotImplementedError

    def encode_images(
        self, pixel_values: torch.Tensor, text_relevance: str, attention_layer: int, **options: Any
    ) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
        """One pass of the vision tower: its outputs as stock returns them, and what the recovery reads off them."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- the two towers

    @torch.no_grad()
    def get_question_embeds(self, question_input_ids: torch.Tensor) -> torch.Tensor:
        """[R, D] float32 unit-norm embeddings of questions [R, T] in CLIP's joint space, pooled at their end token.

        Questions are padded on the right: the tower is causal, so what follows the end token has no influence and no
        mask is needed.
        """
        embeds = self.question_tower(input_ids=question_input_ids).text_embeds
        return nn.functional.normalize(embeds.float(), dim=-1)

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Any = None,
        **options: Any,
    ) -> VisionFeatures:
        """One pass of the vision tower over pixels [I, 3, H, W]; see `VisionFeatures`.

        The layer and the strategy are the config's where they are not given; `image_sizes` is what the processor
        returns in families that have it.
        """
        settings = self.config.recovery_settings()
        if image_sizes is not None:
            options["image_sizes"] = image_sizes
        return self.encode_images(
            pixel_values,
            settings.text_relevance,
            settings.attention_layer,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **options,
        )[1]

    def read_images(
        self,
        pixel_values: torch.Tensor,
        text_relevance: str,
        attention_layer: int,
        vision_feature_layer: int | list[int] | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One pass of the vision tower over pixels [I, 3, H, W], and what is read off its hidden states.

        Returns:
            Its outputs as stock returns them, features [I, 1 + N, C] (the class token first), class attention [I, N],
            keys [I, N, C] and relevance embeddings [I, N, D].
        """
        config = self.config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        wants_states = kwargs.pop("output_hidden_states", None)
        # All of them: which states a list of indices selects differs between transformers 5.12, 5.17 and 5.23.
        outputs = self.vision_tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        states = outputs.hidden_states
        features = torch.cat([states[index] for index in ([layer] if isinstance(layer, int) else layer)], dim=-1)
        encoder = encoder_of(self.vision_tower)
        number = attention_layer % len(encoder.encoder.layers)
        with torch.no_grad():
            scores, keys = read_layer(encoder.encoder.layers[number], states[number], class_attention)
            embeds = relevance_embeddings(encoder, self.visual_projection, states, text_relevance)
        if not (config.output_hidden_states if wants_states is None else wants_states):
            outputs.hidden_states = None
        # A device_map may put a layer elsewhere.
        scores, keys, embeds = (each.to(features.device) for each in (scores, keys, embeds))
        return outputs, features, scores, keys, embeds

    def embed_questions(
        self,
        num_rows: int,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
    ) -> Questions | None:
        """The questions of `num_rows` prompts or images; None without any.

        Called behind the vision tower: while the GPU is busy with that, the host launches the text tower's many small
        kernels.

        Raises:
            ValueError: if there is not one row for each.
        """
        check_question_rows(
            num_rows,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            question_embeds=question_embeds,
        )
        if question_embeds is not None:
            question_embeds = nn.functional.normalize(question_embeds.float(), dim=-1)
        elif question_input_ids is not None:
            question_embeds = self.get_question_embeds(question_input_ids)
        else:
            return None
        if question_attention_mask is None:
            present = question_embeds.new_ones(num_rows, dtype=torch.bool)
        else:
            present = question_attention_mask.bool().any(1).to(question_embeds.device)
        return Questions(question_embeds, present)

    # -------------------------------------------------------------------------------------------------- choosing tokens

    def score(self, vision: VisionFeatures, questions: Questions | None) -> ScoredImages:
        """The relevance of every patch to the question of its image; one row of `questions` per image."""
        if questions is None:
            logger.warning_once(
                "No question was given (question_input_ids or question_embeds): visual tokens are chosen by class "
                "attention alone. The repo's processor adds the question to the inputs."
            )
            return ScoredImages(vision, None, None)
        device = vision.relevance_embeds.device
        embeds = questions.embeds.to(device)
        with full_precision(embeds):
            text_scores = (vision.relevance_embeds @ embeds[:, :, None]).squeeze(2)
        return ScoredImages(vision, text_scores, questions.present.to(device))

    def select(self, images: ScoredImages, settings: RecoverySettings) -> Selection:
        """Which patches of each image stay.

        Tables of all pairs of patches are made for so many images at once as `PAIRS_AT_ONCE` lets.
        """
        num_images, num_patches = images.vision.visual_scores.shape
        at_once = max(PAIRS_AT_ONCE // num_patches**2, 1)
        if num_images <= at_once:
            return self.select_at_once(images, settings)
        starts = range(0, num_images, at_once)
        return join([self.select_at_once(images.rows(slice(start, start + at_once)), settings) for start in starts])

    def select_at_once(self, images: ScoredImages, settings: RecoverySettings) -> Selection:
        """`select` of images whose pairs of patches fit into memory together."""
        vision = images.vision
        given = (images.text_scores, images.has_question, vision.valid)
        limit, budget = (
            None if count is None else count - vision.num_class_tokens
            for count in (settings.max_visual_tokens, settings.visual_token_budget)
        )
        counts: dict[str, Any] = {
            "merge_remaining": settings.merge_remaining,
            "min_visual_tokens": settings.min_visual_tokens,
            "max_visual_tokens": limit,
            "visual_token_budget": budget,
        }
        if settings.selection == "paper":
            with full_precision(vision.visual_scores):
                return select_by_outliers(
                    vision.visual_scores,
                    *given,
                    visual_lof_neighbors=settings.visual_lof_neighbors,
                    text_lof_neighbors=settings.text_lof_neighbors,
                    merge_lof_neighbors=settings.merge_lof_neighbors,
                    lof_threshold=settings.lof_threshold,
                    **counts,
                )
        distance = self.with_distance(vision).distance
        with full_precision(vision.visual_scores):
            return select_by_novelty(
                vision.visual_scores,
                distance,
                *given,
                around=self.around(vision),
                novelty_threshold=settings.novelty_threshold,
                text_share=settings.text_share,
                text_reach=settings.text_reach,
                **counts,
            )

    def with_distance(self, vision: VisionFeatures) -> VisionFeatures:
        """The features with the distances between patches, which no question changes.

        Without them every question about an image computes them again: for whoever keeps the features.
        """
        if vision.distance is not None:
            return vision
        projected = self.project_patches(vision)
        with full_precision(vision.visual_scores):
            return replace(vision, distance=cosine_distance(projected))

    @torch.no_grad()
    def project_patches(self, vision: VisionFeatures) -> torch.Tensor:
        """[I, N, D] every patch behind the projector: what the language model would tell apart."""
        return self.multi_modal_projector(vision.patches).to(vision.patches.device)

    def assemble(
        self, selection: Selection, images: ScoredImages, settings: RecoverySettings, num_tokens: int, num_merged: int
    ) -> Assembly:
        """How each image's `num_tokens` tokens, of which `num_merged` are merged ones, are made of its patches."""
        vision = images.vision
        with full_precision(vision.visual_scores):
            return assemble_tokens(
                selection,
                vision.visual_scores,
                vision.keys,
                images.text_scores,
                images.has_question,
                vision.valid,
                num_tokens=num_tokens,
                num_merged=num_merged,
                merge_neighbors=settings.merge_neighbors,
                text_merge_weight=settings.text_merge_weight,
            )

    def all_tokens(self, vision: VisionFeatures) -> torch.Tensor:
        """[I, N, D] the visual tokens without compression, the class token first where there is one."""
        return self.multi_modal_projector(vision.with_class_token(vision.patches))

    def project(self, vision: VisionFeatures, assembly: Assembly) -> torch.Tensor:
        """[I, K, D] visual tokens in the language model's space; gradients flow through these alone."""
        return self.multi_modal_projector(vision.with_class_token(gather_tokens(vision.patches, assembly)))

    @torch.no_grad()
    def recover(
        self,
        vision: VisionFeatures,
        questions: Questions | None,
        settings: RecoverySettings,
        sizes: Callable[[Selection], tuple[int, int]] | None = None,
    ) -> Recovery:
        """Score, select, assemble: how the visual tokens of each image are made; `project` makes them.

        Args:
            vision: of I images.
            questions: one row per image.
            settings: the call's hyperparameters.
            sizes: reads K and M, the most tokens and merged tokens of an image, off the selection: the place for a
                caller's one copy to the host. None takes the budget's, which needs no copy.

        Raises:
            ValueError: if the budget is larger than an image.
        """
        check_budget(vision, settings)
        images = self.score(vision, questions)
        selection = self.select(images, settings)
        if sizes is None:
            num_tokens = settings.visual_token_budget - vision.num_class_tokens
            num_merged = num_tokens if selection.centres is not None else int(settings.merge_remaining)
        else:
            num_tokens, num_merged = sizes(selection)
        assembly = self.assemble(selection, images, settings, num_tokens, num_merged)
        return Recovery(selection, assembly, vision.visual_scores, images.text_scores, vision.tiles)

    def budget_tokens(
        self, vision: VisionFeatures, questions: Questions | None, settings: RecoverySettings
    ) -> torch.Tensor:
        """[I, visual_token_budget, D]: static shapes from end to end, nothing leaves the device."""
        return self.project(vision, self.recover(vision, questions, settings).assembly)

    # ------------------------------------------------------------------------------------------------ stock's interface

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        settings: RecoverySettings | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """As stock; with `visual_token_budget`, `pooler_output` has exactly that many tokens for each image.

        Args:
            question_input_ids, question_attention_mask, question_embeds: one row per *image* here, as there is no
                prompt to tell which image belongs to which question. Without them class attention chooses alone.
            settings: the hyperparameters of a call that has read them already; the config's by default.
        """
        options: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        if image_sizes is not None:
            options["image_sizes"] = image_sizes
        if settings is None:
            is_stock = not torch.compiler.is_compiling() and _is_stock_forward.get()
            settings = self.config.recovery_settings(compress=False if is_stock else None)
        if not settings.compress or settings.visual_token_budget is None:
            return super().get_image_features(pixel_values, **options, return_dict=True, **kwargs)
        outputs, vision = self.encode_images(
            pixel_values, settings.text_relevance, settings.attention_layer, **options, **kwargs
        )
        questions = self.embed_questions(
            len(vision.patches), question_input_ids, question_attention_mask, question_embeds
        )
        outputs.pooler_output = list(self.budget_tokens(vision, questions, settings))
        return outputs


@contextmanager
def stock_forward() -> Iterator[None]:
    """In this thread, whatever the config says meanwhile, `get_image_features` gives the features of all patches."""
    outer = _is_stock_forward.set(True)
    try:
        yield
    finally:
        _is_stock_forward.reset(outer)


class FrozenLinear(nn.Module):
    """A linear layer that is no `nn.Linear` to tools that look for layers to adapt or to quantise."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values, self.weight, self.bias)

    @classmethod
    def replace_in(cls, module: nn.Module) -> nn.Module:
        """The module, with each of its linear layers, or itself, as a frozen one."""
        if isinstance(module, nn.Linear):
            return cls(module)
        for name, child in module.named_children():
            setattr(module, name, cls.replace_in(child))
        return module


class NumberedName(str):
    """A module's name that reads as a number, but becomes the true one in front of a parameter's or in a text.

    torch makes the names of parameters and buffers so, also those of a wrapper around the model: these, unlike the
    modules', must be the names in the state dict.
    """

    true: str

    def __new__(cls, shown: str, true: str) -> "NumberedName":
        name = super().__new__(cls, shown)
        name.true = true
        return name

    def __add__(self, other: str) -> str:
        return self.true + other

    def __format__(self, how: str) -> str:
        return format(self.true, how)


def check_question_rows(num_rows: int, **question_inputs: torch.Tensor | None) -> None:
    """Raise a ValueError unless every given input has `num_rows` rows."""
    for name, rows in question_inputs.items():
        if rows is not None and len(rows) != num_rows:
            raise ValueError(
                f"{name} has {len(rows)} rows, but there are {num_rows} rows to guide: pass one question per prompt "
                "(get_image_features: one per image)."
            )


def check_budget(vision: VisionFeatures, settings: RecoverySettings) -> None:
    """Raise a ValueError if an image that was cut into tiles has fewer patches than the budget asks for.

    Where all images have N patches, the check of the settings has said so already.
    """
    budget = settings.visual_token_budget
    for number, tiles in enumerate(vision.tiles or ()):
        if budget is not None and budget > tiles.num_patches:
            raise ValueError(
                f"visual_token_budget is {budget}, but image {number} of the batch has only {tiles.num_patches} "
                "patches: lower it, leave it out (adaptive mode), or pass a picture that is less narrow."
            )


def full_precision(like: torch.Tensor) -> AbstractContextManager:
    """No autocast on the tensor's device: in bfloat16 scores and distances would rank other patches."""
    device_type = like.device.type
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
