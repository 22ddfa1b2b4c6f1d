"""Image files of all depths and formats, written byte by byte; expected values follow from the formats."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_core.data.image_files import IMAGE_SUFFIXES, ImageFileError, read_rgb

SAMPLES = (0, 300, 40_000, 65_535)
"""A row of 16-bit samples; their high bytes are 0, 1, 156 and 255."""
HIGH = (0, 1, 156, 255)


def png(depth: int, colour: int, row: bytes, width: int, transparent: bytes = b"") -> bytes:
    """Return a PNG of one row (PNG specification, third edition)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(bits: int, row: bytes, *, black_is_zero: bool, order: str = "<", signed: bool = False) -> bytes:
    """Return a gray TIFF of a row of four samples (TIFF 6.0)."""
    short, long = 3, 4
    entries = [(256, short, 4), (257, short, 1), (258, short, bits), (259, short, 1), (262, short, int(black_is_zero)),
               (273, long, 8), (277, short, 1), (278, short, 1), (279, long, len(row)),
               (339, short, 2 if signed else 1)]  # fmt: skip
    content = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(row)) + row
    content += struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        content += struct.pack(f"{order}HHI", tag, kind, 1)
        content += struct.pack(f"{order}HH", value, 0) if kind == short else struct.pack(f"{order}I", value)
    return content + struct.pack(f"{order}I", 0)


def wide(samples: Sequence[int], order: str = ">") -> bytes:
    return struct.pack(f"{order}{len(samples)}H", *samples)


WHITE = 255
CASES: dict[str, tuple[bytes, Sequence[int] | Sequence[tuple[int, int, int]]]] = {
    "PNG of 16 bits": (png(16, 0, wide(SAMPLES), 4), HIGH),
    "PNG of 16 bits, 300 is transparent": (png(16, 0, wide(SAMPLES), 4, wide([300])), (0, WHITE, 156, 255)),
    "PNG of 16 bits, only the exact value is transparent": (png(16, 0, wide(SAMPLES), 4, wide([301])), HIGH),
    "PNG of 8 bits, 30 is transparent": (png(8, 0, bytes([0, 30, 200, 31]), 4, wide([30])), (0, WHITE, 200, 31)),
    "PNG of 4 bits, 3 is transparent": (png(4, 0, bytes([0x03, 0xAF]), 4, wide([3])), (0, WHITE, 170, 255)),
    "PNG of 2 bits, 1 is transparent": (png(2, 0, bytes([0b00011011]), 4, wide([1])), (0, WHITE, 170, 255)),
    "PNG of 1 bit, 0 is transparent": (png(1, 0, bytes([0b01010000]), 4, wide([0])), (WHITE,) * 4),
    "PNG of 3 times 8 bits, a colour is transparent": (
        png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, wide([1, 2, 3])),
        ((255, 255, 255), (4, 5, 6)),
    ),
    "PNG of 3 times 16 bits, a colour is transparent": (
        png(16, 2, wide([300, 400, 500, 40_000, 50_000, 60_000]), 2, wide([300, 400, 500])),
        ((255, 255, 255), (156, 195, 234)),
    ),
    "PNG of 2 times 16 bits": (png(16, 4, wide([300, 0, 40_000, 65_535]), 2), (WHITE, 156)),
    "TIFF of 16 bits": (tiff(16, wide(SAMPLES, "<"), black_is_zero=True), HIGH),
    "TIFF of 16 bits, Motorola": (tiff(16, wide(SAMPLES), black_is_zero=True, order=">"), HIGH),
    "TIFF of 16 bits, 0 is white": (
        tiff(16, wide(SAMPLES, "<"), black_is_zero=False),
        [(65_535 - sample) >> 8 for sample in SAMPLES],
    ),
    "TIFF of 8 bits, 0 is white": (tiff(8, bytes([0, 30, 200, 255]), black_is_zero=False), (255, 225, 55, 0)),
    "TIFF of 12 bits": (tiff(12, bytes([0xFF, 0xF0, 0x00, 0x80, 0x01, 0x23]), black_is_zero=True), (255, 0, 128, 18)),
    "P5 of 8 bits": (b"P5 4 1 255\n" + bytes([0, 30, 200, 255]), (0, 30, 200, 255)),
    "P5 of 16 bits": (b"P5 4 1 65535\n" + wide(SAMPLES), HIGH),
    "P5 of 12 bits": (
        b"P5 4 1 4095\n" + wide([0, 300, 2000, 4095]),
        [round(sample * 65_535 / 4095) >> 8 for sample in (0, 300, 2000, 4095)],
    ),
    "P2 up to 1000": (b"P2 4 1 1000\n0 300 500 1000\n", [round(v * 65_535 / 1000) >> 8 for v in (0, 300, 500, 1000)]),
    "P6 of 16 bits": (b"P6 1 1 65535\n" + wide([0, 40_000, 65_535]), ((0, 156, 255),)),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_of_any_depth_become_eight_bits_on_white(name: str, tmp_path: Path) -> None:
    content, expected = CASES[name]
    (tmp_path / "x.png").write_bytes(content)  # Formats are told by their content.
    found = np.asarray(read_rgb(tmp_path / "x.png"))[0].tolist()
    assert [tuple(pixel) for pixel in found] == [
        value if isinstance(value, tuple) else (value,) * 3 for value in expected
    ]


@pytest.mark.parametrize(
    "content",
    [
        tiff(32, struct.pack("<4I", 0, 1, 2, 3), black_is_zero=True),
        tiff(16, struct.pack("<4h", 0, 1, -2, 3), black_is_zero=True, signed=True),
        b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5),
    ],
)
def test_samples_of_unknown_range_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ImageFileError, match="range is unknown"):
        read_rgb(tmp_path / "x.tif")


NO_PICTURES = {"EPS", "PDF", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "IPTC", "PALM", "IM"}
"""Formats that Pillow knows and that are programs, stubs without a decoder, numbers, only written, or given up."""


def test_all_suffixes_of_pillow_are_read_but_those_of_no_pictures() -> None:
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in NO_PICTURES}
    assert known - {".pfm"} == IMAGE_SUFFIXES  # PFM holds floats, of unknown range.


def test_what_pillow_writes_is_read(tmp_path: Path) -> None:
    Image.init()
    picture = Image.fromarray(np.full((16, 16, 3), (250, 120, 10), np.uint8))
    written = 0
    for suffix in sorted(IMAGE_SUFFIXES):
        kind = Image.registered_extensions()[suffix]
        if kind not in Image.SAVE or kind == "ICNS":
            continue
        one_bit = kind in ("XBM", "MSP") or suffix == ".pbm"
        gray = suffix == ".pgm" or kind == "BLP"
        image = picture.convert("1") if one_bit else picture.convert("P" if kind == "BLP" else "L") if gray else picture
        image.save(tmp_path / f"x{suffix}")
        with Image.open(tmp_path / f"x{suffix}") as opened:
            expected = np.asarray(opened.convert("RGB"))
        np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / f"x{suffix}")), expected, err_msg=suffix)
        written += 1
    assert written >= 30
