"""Open picture files that may come from strangers: what every tool that reads one calls.

A file is data here, nothing more: only the formats named below are read, whatever its name says. The library would hand
PostScript to Ghostscript, an interpreter of programs.
"""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Of a longer picture LLaVA-1.5, which sees the centre square, would see less than a fiftieth, and LLaVA-NeXT all of it
# in a row of patches, or in none; and enlarged until its short side fits, as image processors do, it would take the
# memory of fifty.
LARGEST_RATIO = 50
MOST_PIXELS = 80_000_000  # under a gigabyte of memory while it is opened


def picture_suffixes() -> tuple[str, ...]:
    """How the names of files in the formats that are read end, in lower case, such as ".png"."""
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in PICTURE_FORMATS))


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned as its camera says, on white where it is transparent.

    Raises:
        ValueError: if there is no such file, it is in no format of `PICTURE_FORMATS` or cannot be read to the end, it
            has more than `MOST_PIXELS`, or one side is more than `LARGEST_RATIO` times the other.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}: pass a picture (JPEG, PNG, WebP, …).")
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            too_large = _too_large(*picture.size)
            if not too_large:
                ImageOps.exif_transpose(picture, in_place=True)
                return _on_white(picture)
    except UnidentifiedImageError:
        names = ", ".join(PICTURE_FORMATS)
        raise ValueError(
            f"{str(path)!r} is no picture in a format that is read here ({names}): convert it to JPEG or PNG."
        ) from None
    except Exception as error:  # a damaged file makes decoders raise anything, and it must not end a batch
        raise ValueError(f"{str(path)!r} cannot be read to the end as a picture ({error}): save it again.") from error
    raise ValueError(f"{str(path)!r} has {picture.width} × {picture.height} pixels, {too_large}.")


def _too_large(width: int, height: int) -> str:
    """What is too large about a picture of this size, and what to do; empty if nothing is."""
    if max(width, height) > LARGEST_RATIO * min(width, height):
        return (
            f"one side more than {LARGEST_RATIO} times the other; a model would see next to nothing of it: crop it to "
            "what you ask about"
        )
    return f"more than {MOST_PIXELS:,}: make it smaller" if width * height > MOST_PIXELS else ""


def _on_white(picture: Image.Image) -> Image.Image:
    """As newer image processors of transformers do; older ones drop the transparency, and show what nobody sees."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white
