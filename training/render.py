"""Scene records to images and to what each patch shows: tensors in, tensors out, on any device.

The same code draws a training batch on the GPU and one picture on the CPU.

Shapes: B images, M objects at most, a canvas of H x W pixels (by default 336 square), V views of it, N patches.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .atlas import PICTURE_SIZE, load_atlas
from .scenes import IMAGE_SIZE, LABEL_PADDING, LETTER_CELL_HEIGHT, LETTER_CELL_WIDTH, OBJECT_FIELDS
from .vocabulary import CLASSES, COLORS, COLUMNS, LETTERS, ROWS, WORDS


PICTURE_MARGIN = 0.14  # of the plate's size on each side of the picture
IGNORED = -100
LEAST_VISIBLE_PLATE, LEAST_VISIBLE_LABEL = 0.4, 0.95  # shares: less of it in a view, and it need not be named
LEAST_LETTER_SCALE = 0.7  # of their size on the canvas: letters that a view shows smaller are not read
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


def _background(batch: dict[str, Tensor], height: int, width: int) -> Tensor:
    size = (height, width)
    coarse = batch["coarse_background"].permute(0, 3, 1, 2).float()
    fine = batch["fine_background"][:, None].float() - 128
    stripes = batch["stripes"].float()
    wave = torch.sin(
        stripes[:, 0, None, None] * torch.arange(width, device=stripes.device, dtype=torch.float32)
        + stripes[:, 1, None, None] * torch.arange(height, device=stripes.device, dtype=torch.float32)[:, None]
        + stripes[:, 2, None, None]
    )
    image = functional.interpolate(coarse, size, mode="bilinear") + functional.interpolate(fine, size, mode="bilinear")
    return ((image + (stripes[:, 3, None, None] * wave)[:, None]) / 255).clamp(0, 1)


def _inside(start: Tensor, length: Tensor, present: Tensor, pixels: Tensor) -> Tensor:
    """Which pixels along one axis lie in [start, start + length): [B, M, pixels]."""
    start, length = start[..., None], length[..., None]
    return (present[..., None] & (pixels >= start) & (pixels < start + length)).float()


def render(
    batch: dict[str, Tensor], constants: dict[str, Tensor], height: int = IMAGE_SIZE, width: int = IMAGE_SIZE
) -> Tensor:
    """Images [B, 3, H, W] in 0..1, rounded to 8 bits, from `scenes.scene_arrays` as tensors."""
    objects = batch["objects"].long()
    background = _background(batch, height, width)
    images, number = objects.shape[:2]
    columns, rows = torch.arange(width, device=objects.device), torch.arange(height, device=objects.device)
    fields = _fields(objects)
    x, y = columns[None, None, :], rows[None, :, None]

    # Nothing overlaps, so the number of the object at a pixel is a sum with one term: a product of matrices.
    present = fields["class_index"] >= 0
    count = torch.arange(1, number + 1, device=objects.device, dtype=torch.float32)[:, None]

    def numbers(left: str, top: str, across: str, down: str) -> Tensor:
        along_y = _inside(fields[top], fields[down], present, rows)
        along_x = _inside(fields[left], fields[across], present, columns)
        return (along_y.mT @ (count * along_x)).long()  # [B, H, W], 0 for none

    label = numbers("label_left", "label_top", "label_width", "label_height")
    on_label = label > 0
    owner = numbers("left", "top", "size", "size") + label
    owner = torch.where(owner > 0, owner - 1, number)
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

    side = PICTURE_SIZE
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


def _overlap(start: Tensor, length: Tensor, first: Tensor, width: Tensor, patches: int) -> Tensor:
    """Share of each patch, along one axis, that [start, start + length) covers: [B, M, patches]."""
    edge = (first[:, None] + torch.arange(patches, device=start.device) * width[:, None])[:, None]
    low = torch.maximum(start[..., None].float(), edge)
    high = torch.minimum((start + length)[..., None].float(), edge + width[:, None, None])
    return (high - low).clamp_min(0) / width[:, None, None]


def patch_targets(
    batch: dict[str, Tensor],
    constants: dict[str, Tensor],
    patches: int,
    windows: Tensor | None = None,
    height: int = IMAGE_SIZE,
    width: int = IMAGE_SIZE,
) -> tuple[Tensor, Tensor]:
    """What each patch shows.

    Args:
        batch: `scenes.scene_arrays` as tensors.
        patches: patches along one side of a view.
        windows: [V, 4], left, top, width and height of the part of the canvas that each view shows, in pixels of the
            canvas; it may reach beyond the canvas. By default one view shows all of it.
        height, width: of the canvas.

    Returns:
        Targets [B * V, N, 7] int64 in the order of GROUPS (IGNORED where a patch shows too little to tell), and the
        object of each patch [B * V, N] (M where there is none), plate and label together. Row and column are those in
        the canvas.
    """
    objects = batch["objects"].long()
    if windows is None:
        windows = torch.tensor([[0, 0, width, height]], device=objects.device, dtype=torch.float32)
    number = objects.shape[1]
    left, top, across, down = windows.repeat(len(objects), 1).unbind(1)
    objects = objects.repeat_interleave(len(windows), 0)
    patch_width, patch_height = across / patches, down / patches
    fields = _fields(objects)
    present = (fields["class_index"] >= 0)[..., None, None]

    def cover(place_x: str, place_y: str, size_x: str, size_y: str) -> Tensor:
        along_y = _overlap(fields[place_y], fields[size_y], top, patch_height, patches)
        along_x = _overlap(fields[place_x], fields[size_x], left, patch_width, patches)
        return (along_y[..., :, None] * along_x[..., None, :] * present).flatten(2)  # [B, M, N]

    plate_covers, label_covers = (
        cover("left", "top", "size", "size"),
        cover("label_left", "label_top", "label_width", "label_height"),
    )
    plate_cover, plate = plate_covers.max(1)
    label_cover, label = label_covers.max(1)
    is_plate = (plate_cover >= 0.35) & (plate_cover >= label_cover)
    is_label = (label_cover >= 0.35) & ~is_plate
    unclear = ~is_plate & ~is_label & (plate_cover + label_cover > 0.12)
    owner = torch.where(is_plate, plate, torch.where(is_label, label, number))
    padded = functional.pad(objects, (0, 0, 0, 1))
    mine = {name: padded[..., index].gather(1, owner) for index, name in enumerate(OBJECT_FIELDS)}
    shown = is_plate | is_label

    def target(value: Tensor, where: Tensor, nothing: int) -> Tensor:
        return torch.where(where, value, torch.where(unclear, IGNORED, nothing))

    def visible(covers: Tensor, area: Tensor) -> Tensor:
        """The share of what a patch shows a part of that lies in its view: [B, N]."""
        pixels = covers.sum(2) * (patch_width * patch_height)[:, None]
        return functional.pad(pixels / area.clamp_min(1), (0, 1)).gather(1, owner)

    # What a view cuts off, it cannot name.
    recognisable = visible(plate_covers, fields["size"] ** 2) >= LEAST_VISIBLE_PLATE
    whole = visible(label_covers, fields["label_width"] * fields["label_height"]) >= LEAST_VISIBLE_LABEL
    # Nor can it read letters that it shows too small.
    legible = torch.maximum(across, down) <= IMAGE_SIZE / LEAST_LETTER_SCALE
    readable = is_label & legible[:, None]

    index = torch.arange(patches * patches, device=objects.device)
    patch_x = left[:, None] + (index % patches + 0.5) * patch_width[:, None]
    patch_y = top[:, None] + (index // patches + 0.5) * patch_height[:, None]
    letter_place = patch_x - mine["label_left"] - LABEL_PADDING
    slot = torch.div(letter_place, LETTER_CELL_WIDTH, rounding_mode="floor").long()
    length = torch.div(mine["label_width"] - 2 * LABEL_PADDING, LETTER_CELL_WIDTH, rounding_mode="floor")
    on_letter = readable & (slot >= 0) & (slot < length)
    letter = constants["spelling"][mine["word"].clamp_min(0), slot.clamp(0, 3)]

    center_x, center_y = mine["left"] + mine["size"] / 2, mine["top"] + mine["size"] / 2
    place_x, place_y = torch.where(shown, center_x, patch_x), torch.where(shown, center_y, patch_y)
    same_column = torch.floor((center_x - left[:, None]) / patch_width[:, None]) == index % patches
    same_row = torch.floor((center_y - top[:, None]) / patch_height[:, None]) == index // patches
    at_center = is_plate & same_column & same_row
    targets = (
        torch.where(shown & ~recognisable, IGNORED, target(mine["class_index"], shown, len(CLASSES))),
        target(mine["color"], is_plate, len(COLORS)),
        torch.where(readable & ~whole, IGNORED, target(mine["word"], readable, len(WORDS))),
        torch.where(readable & ~on_letter, IGNORED, target(letter, on_letter, len(LETTERS))),
        (place_y * len(ROWS) / height).long().clamp(0, len(ROWS) - 1),
        (place_x * len(COLUMNS) / width).long().clamp(0, len(COLUMNS) - 1),
        torch.where(at_center, 0, 1),
    )
    return torch.stack(targets, -1), owner
