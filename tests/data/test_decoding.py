"""One rule for every kind of picture, the same as other readers' where these have one."""

import io
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw
from datasets import Image as ImageFeature
from PIL import Image as Pillow
from torch import Tensor

from adamerge.data.decoding import decode, image_formats, image_suffixes


def pixels(picture: Pillow.Image) -> Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture))


def encoded(picture: Pillow.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def read(content: bytes) -> Tensor | str:
    return decode({"bytes": content, "path": None}, pixels)


def as_datasets_reads(content: bytes) -> Tensor:
    """What the library's own reader gives, as RGB."""
    found = ImageFeature().decode_example({"bytes": content, "path": None})
    return torch.from_numpy(np.array(found.convert("RGB")))


def oriented(value: int) -> Pillow.Exif:
    exif = Pillow.Exif()
    exif[274] = value
    return exif


ODD: dict[str, bytes] = {
    **{
        f"{kind} of orientation {value}": encoded(draw(1, 1), kind, exif=oriented(value))
        for kind, value in (("jpeg", 3), ("jpeg", 6), ("png", 8), ("webp", 5), ("tiff", 6), ("jpeg", 99))
    },
    "cmyk": encoded(draw(1, 1).convert("CMYK"), "jpeg"),
    "ycbcr": encoded(draw(1, 1).convert("YCbCr"), "tiff"),
    "lab": encoded(draw(1, 1).convert("LAB"), "tiff"),
    "grey and alpha": encoded(draw(1, 1).convert("LA"), "png"),
    "palette": encoded(draw(1, 1).convert("P"), "gif"),
    "one bit": encoded(draw(1, 1).convert("1"), "tiff"),
    "first of two frames": encoded(draw(1, 1), "gif", save_all=True, append_images=[draw(2, 2)]),
    "first of two pages": encoded(draw(1, 1), "tiff", save_all=True, append_images=[draw(2, 2)]),
    "portable pixmap": encoded(draw(1, 1), "ppm"),
    "icon": encoded(draw(1, 1).resize((16, 16)), "ico"),
    "jpeg 2000": encoded(draw(1, 1), "jpeg2000"),
}


@pytest.mark.parametrize("kind", ODD)
def test_pictures_are_what_datasets_reads(kind: str) -> None:
    found = read(ODD[kind])
    assert isinstance(found, Tensor), found
    assert torch.equal(found, as_datasets_reads(ODD[kind]))


def test_an_orientation_turns_the_picture() -> None:
    upright, lying = (read(encoded(draw(1, 1), "png", exif=oriented(value))) for value in (1, 6))
    assert torch.equal(lying, torch.rot90(upright, -1))


def test_exif_that_cannot_be_read_turns_nothing() -> None:
    found = read(encoded(draw(1, 1), "png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(7)))
    assert torch.equal(found, read(encoded(draw(1, 1), "png")))


def tiff(levels: list[int], bits: int, sample: int = 1) -> bytes:
    """A grey TIFF of one row, whose levels have a number of bits."""
    row = "".join(f"{level:0{bits}b}" for level in levels)
    data = int(row, 2).to_bytes(len(row) // 8, "big" if bits % 8 else "little")
    data = data if bits % 8 else b"".join(level.to_bytes(bits // 8, "little") for level in levels)
    tags = [(256, 4, len(levels)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, 1), (279, 4, len(data)), (339, 3, sample)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


@pytest.mark.parametrize(
    ("content", "levels"),
    [
        (tiff([0, 15, 16, 4095], 12), [0, 0, 1, 255]),
        (tiff([0, 255, 256, 65535], 16), [0, 0, 1, 255]),
        (tiff([0, 255, 256, 65535], 32), [0, 0, 1, 255]),
        (
            encoded(Pillow.fromarray(np.array([[0, 257, 65535]], np.uint16)), "jpeg2000", irreversible=False),
            None,
        ),
        (b"P5 4 1 4095\n" + struct.pack(">4H", 0, 15, 17, 4095), [0, 0, 1, 255]),
    ],
    ids=["12 bits", "16 bits", "32 bits", "jpeg 2000", "pgm of 12 bits"],
)
def test_levels_of_more_bits_keep_the_upper_eight(content: bytes, levels: list[int] | None) -> None:
    found = read(content)
    assert isinstance(found, Tensor), found
    assert found[0, :, 0].tolist() == (levels or [0, 1, 255])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (tiff([0, 70000], 32), "levels from 0 to 70000 do not fit into 16 bits"),
        (tiff([0, 2**32 - 5], 32, sample=2), "levels from -5 to 0 do not fit into 16 bits"),
        (
            encoded(Pillow.fromarray(np.ones((2, 2), np.float32)), "tiff"),
            "floating-point pixels have no stated range",
        ),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "cannot identify image file",
        ),
        (b"", "cannot identify image file"),
    ],
    ids=["too bright", "negative", "fractions", "a program", "nothing"],
)
def test_pixels_without_a_rule_are_a_problem_of_the_image(content: bytes, problem: str) -> None:
    found = read(content)
    assert isinstance(found, str)
    assert found.startswith(problem)


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_a_bomb_is_a_problem_of_the_image() -> None:
    assert "could be decompression bomb" in str(read(png_of(60000, 60000)))


def test_warnings_of_the_library_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(draw(1, 1), "png")
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", draw(1, 1).width * draw(1, 1).height - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(read(content), Tensor)
        assert isinstance(read(encoded(draw(1, 1), "jpeg")[:-9]), str)


def test_a_pipe_a_socket_and_an_endless_link_are_problems_and_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    os.mkfifo("pipe.png")
    Path("link.png").symlink_to("link.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for name in ("pipe.png", "socket.png", "/dev/zero", "."):
            problem = decode({"bytes": None, "path": name}, pixels)
            assert problem == f"{name} is not a file but a pipe, device, socket or folder"
        assert "Too many levels of symbolic links" in str(decode({"bytes": None, "path": "link.png"}, pixels))


def test_suffixes_are_those_that_the_library_decodes() -> None:
    assert {
        ".jfif",
        ".jpe",
        ".avif",
        ".webp",
        ".tif",
        ".jp2",
        ".ico",
        ".tga",
        ".ppm",
        ".gif",
    } <= image_suffixes()
    assert not {".eps", ".ps", ".h5", ".grib", ".mpg", ".pdf", ".txt", ".svg"} & image_suffixes()
    assert {"JPEG", "PNG", "AVIF"} <= set(image_formats())
