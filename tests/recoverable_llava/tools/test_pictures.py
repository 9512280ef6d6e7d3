"""Opening a picture: what a photographer has, and what an attacker sends."""

import io
import os
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recoverable_llava.tools.pictures import LARGEST_RATIO, PICTURE_FORMATS, open_picture, picture_suffixes


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *extra, data=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(data)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touched) (w) file closefile\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
PHOTO = encoded(Image.effect_noise((64, 48), 50).convert("RGB"), "JPEG", quality=95)


def attacks():
    """From a name to a file that is refused."""
    noise = Image.effect_noise((64, 48), 50).convert("RGB")
    yield "empty", b""
    yield "text", b"no picture"
    yield "postscript", POSTSCRIPT
    yield (
        "postscript behind a DOS header",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(POSTSCRIPT)) + bytes(18) + POSTSCRIPT,
    )
    yield "pdf", b"%PDF-1.7\n1 0 obj\n<< /OpenAction << /S /JavaScript >> >>\nendobj\n"
    yield "svg", SVG
    yield "html", b"<html><img src=x onerror=alert(1)></html>"
    yield "shell script", b"#!/bin/sh\ntouch touched\n"
    yield "pickle", b"\x80\x04cposix\nsystem\nX\x05\x00\x00\x00touch\x85R."
    for kind in ("ICNS", "PCX", "PPM", "SGI", "TGA", "JPEG2000", "DDS", "IM", "SPIDER"):
        image = noise.convert("F") if kind == "SPIDER" else noise.resize((64, 64))
        yield f"a format not named: {kind}", encoded(image, kind)
    for kind in PICTURE_FORMATS:
        whole = encoded(noise, kind)
        yield f"cut {kind}", whole[: len(whole) * 2 // 3]
        yield f"head of {kind}", whole[:24]
    yield "a wide strip", png(12_000, 1, data=bytes(36_001))
    yield "a high strip", png(1, 12_000, data=bytes(4) * 12_000)
    yield "a strip just too long", encoded(Image.new("RGB", (LARGEST_RATIO * 2 + 1, 2)), "PNG")
    yield "more pixels than memory", png(60_000, 60_000)
    yield "a small file that fills a gigabyte", png(9000, 9000, data=b"")
    yield "without pixels", png(0, 0)
    yield "a header that promises more than comes", png(3000, 3000, data=bytes(9))
    yield "negative size", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, 5, 1, 24, 0, 0, 0, 0, 0, 0)
    yield (
        "text that unpacks to gigabytes",
        png(9, 9, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9)), data=bytes(28 * 9)),
    )
    yield (
        "profile that unpacks to gigabytes",
        png(9, 9, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
    )
    yield "directory that points at itself", b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    yield "huge count in a directory", b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 0xFFFFFFFF, 0, 0)
    yield "frames of a film that is cut", encoded(noise, "GIF", save_all=True, append_images=[noise] * 3)[:1500]


@pytest.mark.parametrize("name, content", list(attacks()), ids=[name for name, _ in attacks()])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_attackers_files_are_refused_by_name(name, content, suffix, tmp_path, monkeypatch, programs):
    """In one message that names the file; nothing is run, and memory stays that of a small picture."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"picture{suffix}") as refusal:
        open_picture(path)
    assert "\n" not in str(refusal.value)
    assert sorted(os.listdir(tmp_path)) == [path.name]
    assert not programs.exists()


@pytest.fixture
def programs(tmp_path_factory, monkeypatch):
    """Programs that a library may start come first in the path, and leave this file behind when they are."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("gs", "gswin64c", "gswin32c", "convert", "magick", "djpeg", "ppmquant", "ppmtogif", "sh"):
        program = folder / name
        program.write_text(f"#!{sys.executable}\nopen({str(folder / 'started')!r}, 'w')\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder / "started"


def test_the_trap_for_programs_works(tmp_path, programs, monkeypatch):
    """What the library itself does with such a file; without this, the test above could not fail."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "picture.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(OSError), Image.open(path) as picture:
        picture.load()
    assert programs.exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="There is no file .*picture.png"):
        open_picture(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="There is no file"):
        open_picture("/dev/zero")


def test_any_damage_is_a_refusal_or_a_picture(tmp_path):
    """Bytes changed at random: whatever a decoder raises, the caller sees a ValueError."""
    generator = np.random.default_rng(0)
    path = tmp_path / "picture.bin"
    noise = Image.effect_noise((40, 30), 50).convert("RGB")
    for kind in PICTURE_FORMATS:
        whole = np.frombuffer(encoded(noise, kind), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(0, min(len(whole), 400), generator.integers(1, 12))
            damaged[places] = generator.integers(0, 256, len(places))
            path.write_bytes(damaged.tobytes())
            try:
                assert open_picture(path).mode == "RGB"
            except ValueError as error:
                assert "picture.bin" in str(error)


@pytest.mark.parametrize("kind", PICTURE_FORMATS)
def test_named_formats_open_whatever_the_name(kind, tmp_path):
    image = Image.effect_noise((64, 48), 50).convert("RGB")
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(image, kind))
    assert (open_picture(path).size, open_picture(path).mode) == ((64, 48), "RGB")


def test_what_telephones_write_opens(tmp_path):
    """Several pictures in one JPEG file: the first is it."""
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    first.save(tmp_path / "picture.jpg", "MPO", save_all=True, append_images=[second])
    assert open_picture(tmp_path / "picture.jpg").getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_memory_of_the_largest_picture(mode, tmp_path):
    """Just under the limit, in some hundred KiB of file."""
    Image.new(mode, (8900, 8900)).save(tmp_path / "large.png", **({"transparency": 0} if mode == "P" else {}))
    script = """
import resource, sys
from recoverable_llava.tools.pictures import open_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_picture(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "large.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1024  # MiB


def test_longest_shape_that_is_allowed(tmp_path):
    Image.new("RGB", (2 * LARGEST_RATIO, 2)).save(tmp_path / "long.png")
    assert open_picture(tmp_path / "long.png").size == (2 * LARGEST_RATIO, 2)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (60, 40)).save(tmp_path / "upright.jpg", exif=exif)
    assert open_picture(tmp_path / "upright.jpg").size == (40, 60)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Not the colour that nobody sees."""
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 0, 255))
    picture.convert(mode).save(tmp_path / "picture.png", **({"transparency": 0} if mode == "P" else {}))
    opened = open_picture(tmp_path / "picture.png")
    assert (255, 255, 255) in (opened.getpixel((0, 0)), opened.getpixel((5, 5)))


def test_suffixes_are_those_of_the_formats():
    assert {".png", ".jpg", ".jpeg", ".webp"} <= set(picture_suffixes())
    assert not {".eps", ".ps", ".pdf", ".svg", ".psd"} & set(picture_suffixes())


def test_nobody_else_opens_picture_files():
    """One place decides what is opened, and how. Examples are for copying, and open the demo's picture."""
    root = Path(__file__).parents[3]
    tracked = [
        path
        for folder in ("app", "demo", "evaluation", "recoverable_llava", "docs/scripts")
        for path in (root / folder).rglob("*.py")
    ]
    callers = [path.relative_to(root).as_posix() for path in tracked if "Image.open(" in path.read_text()]
    assert callers == ["recoverable_llava/tools/pictures.py"]
