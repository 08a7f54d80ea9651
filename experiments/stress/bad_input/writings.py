# SPDX-License-Identifier: Apache-2.0
"""Text that is damaged, very long, or odd but legal: one side of a pair, as bytes."""

from collections.abc import Iterator

import numpy as np

LONG = 100_000  # characters


def lines() -> dict[str, bytes]:
    """Name -> one line without its end."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(50)]
    legal = {
        "right to left": "שלום עולם مرحبا بالعالم",
        "directions": "a\u202eb\u202c \u2067c\u2069 \u200f\u200e",
        "combining": "e\u0301 a\u0308\u0323 " + "z" + "\u0301" * 300,
        "combining alone": "\u0301 \u0308 x",
        "decomposed Korean": "\u1112\u1161\u11ab\u1100\u1173\u11af",
        "surrogate pairs": "😀 👩\u200d👩\u200d👧 🇩🇪 𝔘𝔫𝔦",
        "private and unassigned": "\ue000 \U0010ffff \U000e0001 \u0378",
        "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei",
        "carriage return inside": "a\rb",
        "blanks": "a\u00a0b\u3000c\u2003d\u200be\ufefff",
        "control characters": "\x01\x02\x07\x08\x1b[31mred\x7f",
        "mark inside": "a \ufeff b \ufeff",
        "special words": "<s> </s> <pad> <unk> <0x41> @@ @@ a@@ ▁ ▁▁ ▅",
        "quotes and dollars": "$(touch x) `touch x` ; rm -rf x '\"\\ %s {0} {x}",
        "replacement": "\ufffd \ufffe \uffff",
        "tabs for blanks": "a b c",
        "numbers": "1e400 nan -0 ٣ ³ Ⅷ",
        "one character": "x",
    }
    found = {name: text.encode() for name, text in legal.items()}
    found |= {
        "one long word": b"x" * LONG,
        "long words": " ".join(rng.choice(words, LONG // 3)).encode(),
        "long random letters": bytes(rng.integers(97, 123, LONG, np.uint8)),
        "long Chinese": "".join(map(chr, rng.integers(0x4E00, 0x4E80, LONG))).encode(),
        "long blanks": b"a" + b" " * LONG + b"b",
        "long combining": ("a" + "\u0301" * LONG).encode(),
        "long emoji": ("👩\u200d" * (LONG // 2)).encode(),
        "long punctuation": b"!.,;" * (LONG // 4),
        "long digits": b"1.1,1" * (LONG // 5),
        "empty": b"",
        "blank": b" \xc2\xa0\xe3\x80\x80 ",
        "NUL": b"a\0b",
        "only NUL": b"\0",
        "latin1": "Grüße".encode("latin1"),
        "a byte alone": b"a \xff b",
        "cut in a character": "für".encode()[:2],
        "overlong": b"\xc0\xaf \xe0\x80\xaf",
        "surrogate": b"\xed\xa0\x80",
        "beyond Unicode": b"\xf4\x90\x80\x80",
        "utf-16": "abc".encode("utf-16-le"),
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
        "binary": rng.integers(0, 256, 3000, np.uint8).tobytes().replace(b"\n", b" "),
    }
    return found


def refused(line: bytes) -> bool:
    """Returns whether the line is not UTF-8 text."""
    try:
        return "\0" in line.decode()
    except UnicodeDecodeError:
        return True


def fuzz(count: int) -> Iterator[tuple[str, bytes]]:
    """Random characters of all planes, and random bytes."""
    rng = np.random.default_rng(1)
    for i in range(count):
        size = int(rng.integers(1, 80))
        if i % 2:
            points = rng.integers(1, 0x110000, size)
            text = "".join(map(chr, points[(points < 0xD800) | (points > 0xDFFF)]))
            yield f"random characters {i}", text.replace("\n", "").replace("\t", " ").encode()
        else:
            yield f"random bytes {i}", rng.bytes(size).replace(b"\n", b"").replace(b"\t", b" ")
