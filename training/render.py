"""Scene records to images and to what each patch shows: tensors in, tensors out, on any device.

The same code draws a training batch on the GPU and one picture on the CPU.

Shapes: B images, M objects at most, H = W = 336 pixels, N patches.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .atlas import load_atlas
from .scenes import IMAGE_SIZE, LABEL_PADDING, LETTER_CELL_HEIGHT, LETTER_CELL_WIDTH, OBJECT_FIELDS
from .vocabulary import CLASSES, COLORS, COLUMNS, LETTERS, ROWS, WORDS


PICTURE_MARGIN = 0.14  # of the plate's size on each side of the picture
IGNORED = -100
GROUPS = ("class", "color", "word", "letter", "row", "column", "center")
"""What is asked of every patch. In the first four and the last group the index after the last word is "nothing"."""


def renderer_constants(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The atlas and the tables of colors and letters, as tensors on `device`."""
    pictures, letters = load_atlas()
    small = functional.adaptive_avg_pool2d(letters, (LETTER_CELL_HEIGHT, LETTER_CELL_WIDTH))
    spelled = np.full((len(WORDS), 4), 0, np.int64)
    for row, word in zip(spelled, WORDS, strict=True):
        row[: len(word)] = [LETTERS.index(letter) for letter in word]
    constants = {
        "pictures": pictures.reshape(-1, 4),
        "letters": small.reshape(-1),
        "colors": torch.tensor(list(COLORS.values()), dtype=torch.float32) / 255,
        "spelling": torch.from_numpy(spelled),
    }
    return {name: value.to(device) for name, value in constants.items()}


def _fields(objects: Tensor) -> dict[str, Tensor]:
    return {name: objects[..., index] for index, name in enumerate(OBJECT_FIELDS)}


def _background(batch: dict[str, Tensor]) -> Tensor:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    coarse = batch["coarse_background"].permute(0, 3, 1, 2).float()
    fine = batch["fine_background"][:, None].float() - 128
    stripes = batch["stripes"].float()
    grid = torch.arange(IMAGE_SIZE, device=stripes.device, dtype=torch.float32)
    wave = torch.sin(
        stripes[:, 0, None, None] * grid[None, None, :]
        + stripes[:, 1, None, None] * grid[None, :, None]
        + stripes[:, 2, None, None]
    )
    image = functional.interpolate(coarse, size, mode="bilinear") + functional.interpolate(fine, size, mode="bilinear")
    return ((image + (stripes[:, 3, None, None] * wave)[:, None]) / 255).clamp(0, 1)


def render(batch: dict[str, Tensor], constants: dict[str, Tensor]) -> Tensor:
    """Images [B, 3, H, W] in 0..1, rounded to 8 bits, from `scenes.scene_arrays` as tensors."""
    objects = batch["objects"].long()
    background = _background(batch)
    images, number = objects.shape[:2]
    pixels = torch.arange(IMAGE_SIZE, device=objects.device)
    fields = _fields(objects)
    x, y = pixels[None, None, :], pixels[None, :, None]

    owner = torch.full((images, IMAGE_SIZE, IMAGE_SIZE), number, device=objects.device)
    on_label = torch.zeros_like(owner, dtype=torch.bool)
    for index in range(number):
        one = {name: value[:, index, None, None] for name, value in fields.items()}
        present = one["class_index"] >= 0
        plate = (
            present & (x >= one["left"]) & (x < one["left"] + one["size"])
            & (y >= one["top"]) & (y < one["top"] + one["size"])
        )  # fmt: skip
        label = (
            present & (x >= one["label_left"]) & (x < one["label_left"] + one["label_width"])
            & (y >= one["label_top"]) & (y < one["label_top"] + one["label_height"])
        )  # fmt: skip
        owner = torch.where(plate | label, index, owner)
        on_label = on_label | label
    padded = functional.pad(objects, (0, 0, 0, 1))
    flat = owner.reshape(images, -1)
    mine = {name: padded[..., index].gather(1, flat).reshape(owner.shape) for index, name in enumerate(OBJECT_FIELDS)}
    present = owner < number
    size = mine["size"].clamp_min(1).float()
    u, v = (x + 0.5 - mine["left"]) / size, (y + 0.5 - mine["top"]) / size

    # Distance outside the plate's outline in parts of its size: a circle, or a square with round corners.
    du, dv = (u - 0.5).abs(), (v - 0.5).abs()
    circle = (du**2 + dv**2).sqrt() - 0.5
    square = ((du - 0.36).clamp_min(0) ** 2 + (dv - 0.36).clamp_min(0) ** 2).sqrt() - 0.14
    outside = torch.where(mine["round_plate"] > 0, circle, square)
    plate_color = constants["colors"][mine["color"]].permute(0, 3, 1, 2)
    rim = (outside > -0.03)[:, None]
    plate_color = torch.where(rim, 0.55 * plate_color, plate_color)

    side = round((constants["pictures"].shape[0] / len(CLASSES)) ** 0.5)
    inner = 1 - 2 * PICTURE_MARGIN
    picture_x = ((u - PICTURE_MARGIN) / inner * side - 0.5).clamp(0, side - 1.001)
    picture_y = ((v - PICTURE_MARGIN) / inner * side - 0.5).clamp(0, side - 1.001)
    left, top = picture_x.floor().long(), picture_y.floor().long()
    weight_x, weight_y = (picture_x - left)[..., None], (picture_y - top)[..., None]
    first = mine["class_index"].clamp_min(0) * side * side + top * side + left
    source = constants["pictures"]
    picture = (
        (source[first] * (1 - weight_x) + source[first + 1] * weight_x) * (1 - weight_y)
        + (source[first + side] * (1 - weight_x) + source[first + side + 1] * weight_x) * weight_y
    ).permute(0, 3, 1, 2)
    inside = ((u > PICTURE_MARGIN) & (u < 1 - PICTURE_MARGIN) & (v > PICTURE_MARGIN) & (v < 1 - PICTURE_MARGIN))[
        :, None
    ]
    picture = picture * inside
    plate_image = picture[:, :3] + plate_color * (1 - picture[:, 3:])

    letter_x = x - mine["label_left"] - LABEL_PADDING
    letter_y = y - mine["label_top"] - 1
    slot = torch.div(letter_x, LETTER_CELL_WIDTH, rounding_mode="floor")
    length = torch.div(mine["label_width"] - 2 * LABEL_PADDING, LETTER_CELL_WIDTH, rounding_mode="floor")
    on_letter = (slot >= 0) & (slot < length) & (letter_y >= 0) & (letter_y < LETTER_CELL_HEIGHT)
    letter = constants["spelling"][mine["word"].clamp_min(0), slot.clamp(0, 3)]
    cell = LETTER_CELL_WIDTH * LETTER_CELL_HEIGHT
    ink_index = (
        letter * cell
        + letter_y.clamp(0, LETTER_CELL_HEIGHT - 1) * LETTER_CELL_WIDTH
        + letter_x.remainder(LETTER_CELL_WIDTH)
    )
    ink = constants["letters"][ink_index] * on_letter
    dark = mine["dark_label"] > 0
    label_image = torch.where(dark, 0.08 + 0.9 * ink, 0.96 - 0.92 * ink)[:, None]

    image = torch.where((present & ~on_label & (outside <= 0))[:, None], plate_image, background)
    image = torch.where((present & on_label)[:, None], label_image.expand_as(image), image)
    return (image.clamp(0, 1) * 255).round() / 255


def _overlap(start: Tensor, length: Tensor, patches: int) -> Tensor:
    """Share of each patch, along one axis, that [start, start + length) covers: [..., patches]."""
    width = IMAGE_SIZE / patches
    edge = torch.arange(patches, device=start.device) * width
    low = torch.maximum(start[..., None].float(), edge)
    high = torch.minimum((start + length)[..., None].float(), edge + width)
    return (high - low).clamp_min(0) / width


def patch_targets(batch: dict[str, Tensor], constants: dict[str, Tensor], patches: int) -> tuple[Tensor, Tensor]:
    """What each patch shows.

    Args:
        batch: `scenes.scene_arrays` as tensors.
        patches: patches along one side of the image.

    Returns:
        Targets [B, N, 7] int64 in the order of GROUPS (IGNORED where a patch shows too little to tell), and the
        object of each patch [B, N] (M where there is none), plate and label together.
    """
    objects = batch["objects"].long()
    images, number = objects.shape[:2]
    fields = _fields(objects)
    present = (fields["class_index"] >= 0)[..., None, None]

    def cover(left: str, top: str, width: str, height: str) -> Tensor:
        along_y = _overlap(fields[top], fields[height], patches)
        along_x = _overlap(fields[left], fields[width], patches)
        return (along_y[..., :, None] * along_x[..., None, :] * present).flatten(2)  # [B, M, N]

    plate_cover, plate = cover("left", "top", "size", "size").max(1)
    label_cover, label = cover("label_left", "label_top", "label_width", "label_height").max(1)
    is_plate = (plate_cover >= 0.35) & (plate_cover >= label_cover)
    is_label = (label_cover >= 0.35) & ~is_plate
    unclear = ~is_plate & ~is_label & (plate_cover + label_cover > 0.12)
    owner = torch.where(is_plate, plate, torch.where(is_label, label, number))
    padded = functional.pad(objects, (0, 0, 0, 1))
    mine = {name: padded[..., index].gather(1, owner) for index, name in enumerate(OBJECT_FIELDS)}
    shown = is_plate | is_label

    def target(value: Tensor, where: Tensor, nothing: int) -> Tensor:
        return torch.where(where, value, torch.where(unclear, IGNORED, nothing))

    patch_width = IMAGE_SIZE / patches
    index = torch.arange(patches * patches, device=objects.device)
    patch_x, patch_y = (index % patches + 0.5) * patch_width, (index // patches + 0.5) * patch_width
    letter_place = patch_x - mine["label_left"] - LABEL_PADDING
    slot = torch.div(letter_place, LETTER_CELL_WIDTH, rounding_mode="floor").long()
    length = torch.div(mine["label_width"] - 2 * LABEL_PADDING, LETTER_CELL_WIDTH, rounding_mode="floor")
    on_letter = is_label & (slot >= 0) & (slot < length)
    letter = constants["spelling"][mine["word"].clamp_min(0), slot.clamp(0, 3)]

    center_x, center_y = mine["left"] + mine["size"] / 2, mine["top"] + mine["size"] / 2
    place_x, place_y = torch.where(shown, center_x, patch_x), torch.where(shown, center_y, patch_y)
    same_column = torch.floor(center_x / patch_width) == index % patches
    at_center = is_plate & same_column & (torch.floor(center_y / patch_width) == index // patches)
    targets = (
        target(mine["class_index"], shown, len(CLASSES)),
        target(mine["color"], is_plate, len(COLORS)),
        target(mine["word"], is_label, len(WORDS)),
        torch.where(is_label & ~on_letter, IGNORED, target(letter, on_letter, len(LETTERS))),
        (place_y * len(ROWS) / IMAGE_SIZE).long().clamp(0, len(ROWS) - 1),
        (place_x * len(COLUMNS) / IMAGE_SIZE).long().clamp(0, len(COLUMNS) - 1),
        torch.where(at_center, 0, 1),
    )
    return torch.stack(targets, -1), owner
