#!/usr/bin/env python3
"""Writes tests/data/pictures and seeds of tests/data/image_fuzz: small pictures of every kind.

    python3 tools/picture_fixtures.py          (needs Pillow and numpy)

NAME.png beside NAME.ppm: what Pillow reads from it, upright, transparency over white.  Adam7 files,
16-bit ones with alpha, and bombs are written here chunk by chunk, because Pillow cannot.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DATA = Path(__file__).resolve().parent.parent / "tests/data"
PICTURES = DATA / "pictures"
SEEDS = DATA / "image_fuzz"
W, H = 13, 9
PASSES = [  # Adam7: first x, first y, steps
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
]


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def rows(pixels, depth):
    """Filter byte 0 and the packed samples of each row of an array [h, w, channels]."""
    out = b""
    for row in pixels:
        flat = row.reshape(-1)
        if depth == 16:
            packed = flat.astype(">u2").tobytes()
        elif depth == 8:
            packed = flat.astype(np.uint8).tobytes()
        else:
            bits = "".join(format(int(v), f"0{depth}b") for v in flat)
            bits += "0" * (-len(bits) % 8)
            packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
        out += b"\0" + packed
    return out


def png(pixels, depth, kind, adam7=False, before=b"", after=b""):
    h, w = pixels.shape[:2]
    data = rows(pixels, depth)
    if adam7:
        parts = [pixels[y::dy, x::dx] for x, y, dx, dy in PASSES]
        data = b"".join(rows(p, depth) for p in parts if p.size)
    head = struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, adam7)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before
            + chunk(b"IDAT", zlib.compress(data, 9)) + after + chunk(b"IEND", b""))


def over_white(im):
    a = np.asarray(im.convert("RGBA")).astype(np.int64)
    alpha = a[..., 3:]
    return ((a[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def expected(data):
    im = Image.open(io.BytesIO(data))
    if im.mode.startswith("I"):  # 16-bit grey: the high byte, as Pillow does for 16-bit colours
        return np.repeat((np.asarray(im).astype(np.int64) >> 8)[..., None], 3, 2).astype(np.uint8)
    return over_white(ImageOps.exif_transpose(im))


def save(name, data, want=None):
    want = expected(data) if want is None else want
    (PICTURES / f"{name}.png").write_bytes(data)
    h, w = want.shape[:2]
    (PICTURES / f"{name}.ppm").write_bytes(b"P6\n%d %d\n255\n" % (w, h) + want.tobytes())


def exif(orientation):
    return b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1" + struct.pack(">HHI", orientation, 0, 0)


def kinds(rng):
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    plte = chunk(b"PLTE", palette.tobytes())
    trns = chunk(b"tRNS", bytes(rng.integers(0, 256, 7, dtype=np.uint8)))
    for adam7 in (False, True):
        end = "_adam7" if adam7 else ""
        for depth in (1, 2, 4, 8, 16):
            grey = rng.integers(0, 1 << depth, (H, W, 1))
            wide = np.repeat(grey * (255 // ((1 << depth) - 1)), 3, 2).astype(np.uint8)
            save(f"grey{depth}{end}", png(grey, depth, 0, adam7), wide if depth < 8 else None)
        for depth in (8, 16):
            for kind, channels, name in ((2, 3, "rgb"), (4, 2, "greya"), (6, 4, "rgba")):
                px = rng.integers(0, 1 << depth, (H, W, channels))
                high = px >> (depth - 8)
                wide = high
                if kind == 4:
                    wide = np.concatenate([np.repeat(high[..., :1], 3, 2), high[..., 1:]], 2)
                want = over_white(Image.fromarray(wide.astype(np.uint8)))
                save(f"{name}{depth}{end}", png(px, depth, kind, adam7), want)
        index = rng.integers(0, 16, (H, W, 1))
        save(f"palette4{end}", png(index, 4, 3, adam7, plte))
        save(f"palette4_trns{end}", png(index, 4, 3, adam7, plte + trns))
    px = rng.integers(0, 256, (H, W, 3))
    key = tuple(int(v) for v in px[4, 5])
    save("rgb8_trns", png(px, 8, 2, before=chunk(b"tRNS", struct.pack(">HHH", *key))))
    for turn in range(9):  # 0 is none of EXIF's
        save(f"exif{turn}", png(px, 8, 2, before=chunk(b"eXIf", exif(turn))))
    save("exif3_after", png(px, 8, 2, after=chunk(b"eXIf", exif(3))))
    other = rng.integers(0, 256, (H, W, 3))
    control = struct.pack(">IIIIIHHBB", 0, W, H, 0, 0, 1, 10, 0, 0)
    second = struct.pack(">IIIIIHHBB", 1, W, H, 0, 0, 1, 10, 0, 0)
    before = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", control)
    frame = struct.pack(">I", 2) + zlib.compress(rows(other, 8), 9)
    after = chunk(b"fcTL", second) + chunk(b"fdAT", frame)
    save("animated", png(px, 8, 2, before=before, after=after), px.astype(np.uint8))
    white = png(np.ones((4096, 4096, 1), dtype=np.uint8), 1, 0)  # 2 kB: an all-white mask
    (PICTURES / "white4096.png").write_bytes(white)


def bombs():
    """Small enough for the fuzzer, each a thousand times its size when inflated."""
    one = np.zeros((1, 1, 3), dtype=np.uint8)
    zeros = zlib.compress(bytes(4 << 20), 9)
    plain = png(one, 8, 2)
    head = plain[: 8 + 25]
    (SEEDS / "bomb_idat.png").write_bytes(head + chunk(b"IDAT", zeros) + chunk(b"IEND", b""))
    (SEEDS / "bomb_icc.png").write_bytes(png(one, 8, 2, before=chunk(b"iCCP", b"x\0\0" + zeros)))
    (SEEDS / "bomb_text.png").write_bytes(png(one, 8, 2, before=chunk(b"zTXt", b"x\0\0" + zeros)))
    (SEEDS / "bomb_itxt.png").write_bytes(png(one, 8, 2, after=chunk(b"iTXt", b"x\0\1\0\0\0" + zeros)))
    (SEEDS / "exif.png").write_bytes((PICTURES / "exif6.png").read_bytes())
    (SEEDS / "adam7_16.png").write_bytes((PICTURES / "rgba16_adam7.png").read_bytes())
    (SEEDS / "animated.png").write_bytes((PICTURES / "animated.png").read_bytes())
    buf = io.BytesIO()
    Image.new("RGB", (40, 24), (90, 120, 30)).save(buf, "JPEG", progressive=True, quality=60)
    jpeg = buf.getvalue()
    at = jpeg.rindex(b"\xff\xda")
    (SEEDS / "bomb_scans.jpg").write_bytes(jpeg[:at] + jpeg[at:-2] * 120 + jpeg[-2:])
    bmp = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(bmp, "BMP")
    b = bytearray(bmp.getvalue())
    b[22:26] = struct.pack("<i", -4)
    (SEEDS / "topdown.bmp").write_bytes(bytes(b))


def main():
    PICTURES.mkdir(exist_ok=True)
    kinds(np.random.default_rng(7))
    bombs()


if __name__ == "__main__":
    main()
