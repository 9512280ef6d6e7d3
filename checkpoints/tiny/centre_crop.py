"""Long pictures without the cost of what nobody sees of them.

Stock enlarges a picture until its short side fits, then crops the centre: of 12,000 x 1 pixels, 4,032,000 x 336, and
13 GiB of memory, for the 336 x 336 in the middle. Here only the middle is resized, with the same filter at the same
places, so that stock's own steps find nothing left to do but the crop.
"""

import math
from typing import Any

from transformers.image_utils import is_pil_image


# Times as long as wide; shorter pictures are stock's in every step.
LONG = 10
# Bilinear, bicubic and Lanczos. Others pick a pixel, and rounding would pick its neighbour.
FILTERS = (2, 3, 1)
# Source pixels that the widest filter (Lanczos) reads to either side of one that is enlarged, and one more.
FILTER_REACH = 4


def resize_what_is_seen(images: Any, image_processor: Any, **settings: Any) -> Any:
    """Images as an image processor takes them (one, or lists of any depth), with long pictures cut to their middle.

    Left to stock: tensors and arrays, pictures with transparency, which stock blends differently from version to
    version, and settings other than a resized shortest edge and a centre crop.

    Args:
        images: not modified.
        image_processor: stock's.
        settings: what the caller sets for this call, in place of the image processor's own.
    """

    def setting(name: str) -> Any:
        return getattr(image_processor, name, None) if settings.get(name) is None else settings[name]

    size, crop_size = setting("size"), setting("crop_size")
    steps = ("do_resize", "do_center_crop", "do_convert_rgb")
    if not all(map(setting, steps)) or setting("resample") not in FILTERS:
        return images
    if not all(hasattr(each, "get") for each in (size, crop_size)) or dict(size).keys() != {"shortest_edge"}:
        return images

    def cut(images: Any) -> Any:
        if isinstance(images, (list, tuple)):
            return [cut(image) for image in images]
        if not is_pil_image(images) or images.has_transparency_data or max(images.size) <= LONG * min(images.size):
            return images
        length = crop_size["width" if images.width > images.height else "height"]
        return _resized_middle(images.convert("RGB"), size["shortest_edge"], length, setting("resample"))

    return cut(images)


def _resized_middle(image: Any, short_edge: int, crop_length: int, resample: Any) -> Any:
    """The middle of what stock's resizing to `short_edge` makes of an image, at least `crop_length` long."""
    is_wide = image.width > image.height
    short, long = sorted(image.size)
    resized = int(short_edge * long / short)  # as stock rounds it
    # As many pixels before the middle as behind, and a whole number of twos, so that the crop starts at the same pixel
    # whichever way stock rounds half a pixel.
    length = max(short_edge, crop_length)
    length += (resized - length) % 4
    if length >= resized:
        return image
    scale = long / resized
    start, end = (resized - length) / 2 * scale, (resized + length) / 2 * scale
    # Cut first, as the library holds the box's corners in single precision, which is fine only near zero.
    reach = FILTER_REACH * max(math.ceil(scale), 1)
    first, last = max(math.floor(start) - reach, 0), min(math.ceil(end) + reach, long)
    box = (start - first, 0, end - first, short)
    if is_wide:
        return image.crop((first, 0, last, short)).resize((length, short_edge), resample, box=box)
    return image.crop((0, first, short, last)).resize((short_edge, length), resample, box=(0, box[0], short, box[2]))
