"""Training batches: scenes, packed conversations and captions as arrays, made by loader processes.

One image prefix serves a whole conversation (the LLaVA-1.5 recipe, and the efficient one): its turns are packed
behind the image until the text length is full. The first turn is what a single question sees, so it weighs more.

Shapes: B scenes, T text tokens behind the image, Q turns at most, E texts per scene for the CLIP half, S their length.
"""

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .language import WordEncoder, language_tokenizer, question_tokenizer
from .questions import FACTS, KINDS, conversation, long_caption, scene_facts, short_caption
from .scenes import MAXIMUM_OBJECTS, Scene, make_scene, scene_arrays, scene_random
from .tiles import MOST_OBJECTS, PICTURE_SIZES, make_tiled_scene, tiled_random, tiling


TEXT_LENGTH = 253
MAXIMUM_TURNS = 16
CAPTION_LENGTH = 64
CAPTIONS = 3  # a long caption, a short one, a question
FIRST_TURN_WEIGHT = 4.0
END_WEIGHT = 0.2  # of the end token after an answer, which is learned at once


class BatchMaker:
    """Makes the batch of given example indices of one split; the same arguments give the same arrays."""

    most_objects = MAXIMUM_OBJECTS

    def __init__(self, split: str, seed: int = 0, turns: int = MAXIMUM_TURNS) -> None:
        self.split, self.seed, self.turns = split, seed, turns
        self.language, self.captions = WordEncoder(language_tokenizer()), WordEncoder(question_tokenizer())
        tokenizer, clip = language_tokenizer(), question_tokenizer()
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.clip_start, self.clip_end = clip.bos_token_id, clip.eos_token_id
        self.prefix = [tokenizer.bos_token_id, *self.language("USER:")]

    def scene(self, index: int) -> tuple[Scene, random.Random]:
        rng = scene_random(self.split, index, self.seed)
        return make_scene(self.split, rng), rng

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        """`objects` and backgrounds (scene_arrays), `text` [B, T], `labels` [B, T] (-100 outside answers),
        `weights` [B, T], `turn` [B, T] (-1 outside answers), `kinds` [B, Q] (-1 for no turn), `captions` [B, E, S],
        `caption_facts` [B, E, F], `scene_facts` [B, F]."""
        batch = len(indices)
        text = np.full((batch, TEXT_LENGTH), self.pad, np.int64)
        labels = np.full((batch, TEXT_LENGTH), -100, np.int64)
        weights = np.zeros((batch, TEXT_LENGTH), np.float32)
        turn_of = np.full((batch, TEXT_LENGTH), -1, np.int64)
        kinds = np.full((batch, MAXIMUM_TURNS), -1, np.int64)
        captions = np.full((batch, CAPTIONS, CAPTION_LENGTH), self.clip_end, np.int64)
        caption_facts = np.zeros((batch, CAPTIONS, FACTS), np.bool_)
        facts = np.zeros((batch, FACTS), np.bool_)
        scenes: list[Scene] = []
        for row, index in enumerate(indices):
            scene, rng = self.scene(index)
            scenes.append(scene)
            turns = conversation(scene, rng, self.turns)
            at = 0
            for number, turn in enumerate(turns):
                question = self.language(("USER: " if number else "") + turn.question + " ASSISTANT:")
                answer = [*self.language(turn.answer), self.end]
                start, stop = at + len(question), at + len(question) + len(answer)
                if stop > TEXT_LENGTH:
                    break
                text[row, at:start], text[row, start:stop] = question, answer
                labels[row, start - 1 : stop - 1] = answer  # the position before a token predicts it
                weights[row, start - 1 : stop - 1] = 1.0 if number else FIRST_TURN_WEIGHT
                weights[row, stop - 2] *= END_WEIGHT
                turn_of[row, start - 1 : stop - 1] = number
                kinds[row, number] = KINDS.index(turn.kind)
                at = stop
            asked = rng.choice(turns)
            described = (long_caption(scene, rng), short_caption(scene, rng), (asked.question, set(asked.classes)))
            for column, (caption, held) in enumerate(described):
                ids = [self.clip_start, *self.captions(caption)[: CAPTION_LENGTH - 2], self.clip_end]
                captions[row, column, : len(ids)] = ids
                caption_facts[row, column, list(held)] = True
            facts[row, list(scene_facts(scene))] = True
        arrays = scene_arrays(scenes, self.most_objects) | {
            "text": text, "labels": labels, "weights": weights, "turn": turn_of, "kinds": kinds,
            "captions": captions, "caption_facts": caption_facts, "scene_facts": facts,
        }  # fmt: skip
        return {name: torch.from_numpy(value) for name, value in arrays.items()}


class TiledBatchMaker(BatchMaker):
    """Makes batches of `tiles.py`: pictures of one size, as many as have `len(indices)` views together."""

    most_objects = MOST_OBJECTS
    size = PICTURE_SIZES[0]

    def scene(self, index: int) -> tuple[Scene, random.Random]:
        rng = tiled_random(self.split, index, self.seed)
        rng.choice(PICTURE_SIZES)  # the size that this index draws where it is not one of a batch
        return make_tiled_scene(self.split, rng, self.size), rng

    def __call__(self, indices: list[int]) -> dict[str, Any]:
        """As `BatchMaker`, and `picture_size`, the height and width of the pictures."""
        self.size = tiled_random(self.split, indices[0], self.seed).choice(PICTURE_SIZES)
        pictures = max(len(indices) // tiling(*self.size).views, 1)
        return super().__call__(indices[:pictures]) | {"picture_size": self.size}


class Batches(Dataset):
    """Batch number `step` of one of `ranks` processes, for a DataLoader without automatic batching."""

    def __init__(
        self,
        split: str,
        batch_size: int,
        first: int,
        last: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        maker: type[BatchMaker] = BatchMaker,
    ):
        self.batch_size, self.first, self.last, self.rank, self.ranks = batch_size, first, last, rank, ranks
        self.split, self.seed = split, seed
        self.maker_class, self.maker = maker, None

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, item: int) -> dict[str, Any]:
        if item >= len(self):
            raise IndexError(item)
        if self.maker is None:  # built in the loader process: tokenizers do not like to be forked
            self.maker = self.maker_class(self.split, self.seed)
        start = ((self.first + item) * self.ranks + self.rank) * self.batch_size
        return self.maker(list(range(start, start + self.batch_size)))
