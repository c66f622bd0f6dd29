"""Pictures as bytes: what may be one, and how it becomes pixels."""

import contextlib
import hashlib
import io
import warnings
from dataclasses import dataclass, field

from PIL import Image, ImageOps

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 2**25  # 100 MB decoded; models scale what is larger than a few million down
# Decoded in this process, without helper programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class PictureError(ValueError):
    """Bytes that are no picture, or too large; names the field and the value."""


@dataclass(frozen=True, slots=True)
class Picture:
    """sha256 of its bytes, in hex, which it is the same by."""

    sha256: str
    data: bytes = field(repr=False, compare=False)

    @classmethod
    def of(cls, data: bytes) -> "Picture":
        """With its hash."""
        return cls(picture_hash(data), data)


def picture_hash(data: bytes) -> str:
    """sha256 of the bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def open_picture(
    data: bytes, name: str, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """In RGB, upright by its EXIF, on white where it is transparent: as vLLM reads it.

    The limits are checked before anything is decoded. name: whose these bytes are, for the error.
    Raises PictureError.
    """
    if len(data) > max_bytes:
        raise PictureError(f"{name}: {len(data)} bytes, must be at most {max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > max_pixels:
            raise PictureError(
                f"{name}: {width} x {height} pixels, must be at most {max_pixels} in all"
            )
        picture.load()
        with contextlib.suppress(Exception):  # a broken EXIF turns nothing
            picture = ImageOps.exif_transpose(picture)
        return _rgb(picture)
    except PictureError:
        raise
    except Exception as error:  # decoders raise what they like on broken bytes
        raise PictureError(f"{name}: {len(data)} bytes, not a readable picture: {error}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")
