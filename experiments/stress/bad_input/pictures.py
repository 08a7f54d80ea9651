# SPDX-License-Identifier: Apache-2.0
"""Images that are damaged, too large, or odd but legal, with the expected result of each."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

FLIPS, CUTS = 16, 12  # of every whole picture


class Case(NamedTuple):
    """One image. ``want``: its pixels [h, w, channels]; None: it has to be refused.

    "any": a format without checksums, whose damage shows only by luck: no more can be asked than
    that nothing breaks.
    """

    name: str
    data: bytes
    want: np.ndarray | str | None
    within: int = 1  # levels by which a pixel may differ
    refusable: bool = False  # these pixels or a refusal, but no other pixels


def picture() -> Image.Image:
    """Smooth, so that JPEG keeps it nearly as it is."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((70, 50), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole() -> dict[str, tuple[bytes, int]]:
    """Legal files, and the levels by which OpenCV's and Pillow's pixels may differ."""
    rgb = picture()
    half = np.zeros((50, 70), np.uint8)
    half[:25] = 255
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(half))
    few, grey, turned = rgb.quantize(16), rgb.convert("L"), rgb.rotate(180)
    animated = dict(save_all=True, append_images=[turned])
    return {
        "png": (encode(rgb, "PNG"), 1),
        "png alpha": (encode(alpha, "PNG"), 1),
        "png grey": (encode(grey, "PNG"), 1),
        "png grey alpha": (encode(alpha.convert("LA"), "PNG"), 1),
        "png palette": (encode(few, "PNG"), 1),
        "png palette transparent": (encode(few, "PNG", transparency=3), 1),
        "png palette alpha": (encode(few, "PNG", transparency=bytes(range(16))), 1),
        "png palette 4 bit": (encode(few, "PNG", bits=4), 1),
        "png 1 bit": (encode(rgb.convert("1"), "PNG"), 1),
        "png colour key": (encode(rgb, "PNG", transparency=(1, 2, 3)), 1),
        "png animated": (encode(rgb, "PNG", **animated), 1),
        "png animated apart": (encode(rgb, "PNG", default_image=True, **animated), 1),
        "jpeg": (encode(rgb, "JPEG", quality=95), 5),
        "jpeg progressive": (encode(rgb, "JPEG", quality=95, progressive=True), 5),
        "jpeg grey": (encode(grey, "JPEG", quality=95), 5),
        "jpeg cmyk": (encode(rgb.convert("CMYK"), "JPEG", quality=95), 5),
        "jpeg thin": (encode(rgb.crop((0, 0, 1, 50)), "JPEG", quality=95), 5),
        "gif": (encode(rgb, "GIF"), 1),
        "gif animated": (encode(rgb.quantize(32), "GIF", save_all=True,
                                append_images=[turned.quantize(32)]), 1),
        "bmp": (encode(rgb, "BMP"), 1),
        "bmp grey": (encode(grey, "BMP"), 1),
        "bmp palette": (encode(few, "BMP"), 1),
        "bmp 1 bit": (encode(rgb.convert("1"), "BMP"), 1),
        "webp": (encode(rgb, "WEBP", lossless=True), 1),
        "webp alpha": (encode(alpha, "WEBP", lossless=True, exact=True), 1),
        "webp animated": (encode(rgb, "WEBP", lossless=True, **animated), 1),
    }  # fmt: skip


def seen(data: bytes, channels: int) -> np.ndarray:
    """Returns Pillow's pixels."""
    image = Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")
    return np.array(image).reshape(image.height, image.width, channels)


def cases(channels: int) -> Iterator[Case]:
    """All of them, always the same."""
    rng = np.random.default_rng(channels)
    for name, (data, within) in whole().items():
        yield Case(name, data, seen(data, channels), within)
        checked = name.startswith("png") and "animated" not in name  # every byte has a checksum
        for i in range(FLIPS):
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
            want = seen(data, channels) if checked else "any"
            yield Case(f"{name}, bit flip {i}", bytes(flipped), want, within, True)
        for i in range(CUTS):
            at = int(rng.integers(len(data)))
            frames = "animated" in name  # the first one may be whole
            yield Case(f"{name}, cut to {at} ({i})", data[:at], "any" if frames else None)
    yield from _sixteen_bits(channels)
    yield from _bombs()
    yield from _nothing(rng)


def _sixteen_bits(channels: int) -> Iterator[Case]:
    grey = np.array(picture().convert("L"))
    deep = encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    # Pillow would clip 16 bits to 8; the upper eight are the picture
    yield Case("png 16 bit grey", deep, grey[..., None].repeat(channels, 2), 0)


# ------------------------------------------------------------------------------------------ bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *, colour: int = 2, extra: bytes = b"") -> bytes:
    """Returns a PNG with any header; `pixels` are compressed already."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def zeros(count: int) -> bytes:
    """Compresses so many zero bytes without holding them in memory."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**20)) for _ in range(count // 2**20)]
    return b"".join(parts) + packer.compress(bytes(count % 2**20)) + packer.flush()


def jpeg(width: int, height: int, **options: object) -> bytes:
    """Returns a small JPEG with another frame header."""
    data = bytearray(encode(picture(), "JPEG", **options))
    at = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _bombs() -> Iterator[Case]:
    for width, height in (
        *((60_000, 60_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)),
        *((0, 10), (10, 0), (0, 0), (10_001, 10_000), (2**32 - 1, 1), (1, 2**27)),
    ):
        for colour in (0, 2, 3, 4, 6):
            name = f"png says {width}x{height}, colour type {colour}"
            yield Case(name, png(width, height, zlib.compress(bytes(99)), colour=colour), None)
    yield Case("png bomb 32768x32768", png(32768, 32768, zeros(32769 * 32768), colour=0), None)
    for kind in (b"zTXt", b"iCCP"):
        extra = chunk(kind, b"a\0\0" + zeros(2**30))
        yield Case(f"png bomb in {kind!r}", png(2, 2, zeros(14), extra=extra), "any")
    for side in (0, 1, 10_001, 30_000, 65_500):
        want = "any" if side == 1 else None
        yield Case(f"jpeg says {side}", jpeg(side, side), want)
        yield Case(f"progressive says {side}", jpeg(side, side, progressive=True), want)
    slow = jpeg(9000, 9000, progressive=True)
    last = slow[slow.rindex(b"\xff\xda") : slow.rindex(b"\xff\xd9")]
    yield Case("jpeg of 20,000 scans", slow[: slow.rindex(b"\xff\xda")] + last * 20_000, None)
    for name, at, form in (("gif", 6, "<HH"), ("bmp", 18, "<ii")):
        data = whole()[name][0]
        for w, h in ((60_000, 60_000), (0, 0), (0, 9), (10_001, 10_000)):
            head = data[:at] + struct.pack(form, w, h)
            yield Case(f"{name} says {w}x{h}", head + data[at + struct.calcsize(form) :], None)
    bmp = whole()["bmp"][0]
    yield Case("bmp of negative width", bmp[:18] + struct.pack("<i", -70) + bmp[22:], None)
    still = [Image.fromarray(np.full((64, 64), i % 255, np.uint8)) for i in range(2000)]
    many = encode(still[0], "GIF", save_all=True, append_images=still[1:])
    yield Case("gif of 2,000 frames", many, "any")


def _nothing(rng: np.random.Generator) -> Iterator[Case]:
    """Not an image at all."""
    starts = [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"<svg>", b"%PDF-1.7"]
    starts += [b"RIFF\xff\xff\xff\xffWEBP", b"II*\0", b"MM\0*", b"v/1\x01", b"#?RADIANCE\n"]
    starts += [b"\0\0\0\x0cjXL ", b"P6 9999 9999 255\n", b"\0\0\0\x18ftypavif"]
    starts += [b"\0\0\0\x0cjP  \r\n\x87\n"]
    for start in starts:
        for length in (0, 1, 10, 1000, 100_000):
            junk = rng.integers(0, 256, length, np.uint8).tobytes()
            yield Case(f"{start!r} and {length} random bytes", start + junk, None)
    for kind in ("TIFF", "PPM", "ICO", "TGA"):
        yield Case(f"{kind}, not read", encode(picture(), kind), None)
