"""Bytes as pictures, within limits."""

import io

import pytest
from PIL import Image

from tests.support.tiny_vision import picture, png
from value_server.model.pictures import PictureError, open_picture, picture_hash


def test_a_picture_and_its_hash() -> None:
    found = open_picture(png(), "images[0]")
    assert found.mode == "RGB"
    assert found.tobytes() == picture().tobytes()
    assert picture_hash(png()) == picture_hash(png()) != picture_hash(png(1))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", r"images\[0\]: 0 bytes, not a readable picture"),
        (b"GIF89a", r"images\[0\]: 6 bytes, not a readable picture"),
        (png()[:900], r"images\[0\]: 900 bytes, not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a readable picture"),
        (png(0, 200, 200), r"images\[0\]: 12\d{4} bytes, must be at most 100000"),
        (png(0, 200, 100), r"images\[0\]: 200 x 100 pixels, must be at most 10000 in all"),
    ],
)
def test_what_is_none(data: bytes, told: str) -> None:
    with pytest.raises(PictureError, match=told):
        open_picture(data, "images[0]", max_bytes=100_000, max_pixels=10_000)


def test_a_bomb_is_not_decoded() -> None:
    """The bug guarded against: a few KB that become gigabytes."""
    out = io.BytesIO()
    Image.new("1", (7000, 7000)).save(out, "PNG")
    assert len(out.getvalue()) < 10_000
    with pytest.raises(PictureError, match="7000 x 7000 pixels, must be at most"):
        open_picture(out.getvalue(), "images[0]")


def test_transparency_is_on_white_and_exif_turns() -> None:
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    out = io.BytesIO()
    clear.save(out, "PNG", exif=exif)
    found = open_picture(out.getvalue(), "images[0]")
    assert found.size == (2, 4)
    assert found.getpixel((0, 0)) == (255, 255, 255)
