"""One image file: decoded as it should look, within bounds, or a reason why not."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from matryoshka_diffusion.data.augment import cut_out
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.image import read_picture
from matryoshka_diffusion.pyramid import Resolution
from picturing import ADOBE, COLOURS, SIDE, chunk, icc_profile, noise, png_bytes, save

RED, WHITE = COLOURS[0], (255, 255, 255)


def middle(path: Path) -> tuple[int, ...]:
    return tuple(read_picture(path, SIDE).pixels[8, 8].tolist())


# --- as it should look -------------------------------------------------------------------------


NAMES = ["a.png", "a.webp", "a.jpg", "a.avif", "a.gif", "a.tif", "a.bmp", "wrong-suffix.png"]


@pytest.mark.parametrize("name", NAMES)
def test_the_accepted_formats_decode(tmp_path, name):
    save(tmp_path / name, format="JPEG" if "wrong" in name else None)
    picture = read_picture(tmp_path / name, SIDE)
    assert picture.pixels.shape == (SIDE, SIDE, 3)
    assert picture.size == (20, 24)
    assert np.abs(picture.pixels.astype(int) - RED).max() < 8


@pytest.mark.parametrize("shape", [(61, 37), (37, 62), (50, 50), (16, 200), (16, 16)])
def test_a_centre_crop_resizes_the_middle_square_alone(tmp_path, shape):
    pixels = noise(*shape)
    edge, (top, left) = min(shape), ((length - min(shape)) // 2 for length in shape)
    box = (left, top, left + edge, top + edge)
    expected = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
    path = save(tmp_path / "a.png", pixels)
    assert (read_picture(path, SIDE).pixels == np.asarray(expected)).all()
    assert (read_picture(path.read_bytes(), SIDE).pixels == np.asarray(expected)).all()


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((61, 37), (26, 16)),
        ((37, 61), (16, 26)),
        ((50, 50), (16, 16)),
        ((SIDE, 10 * SIDE), (16, 64)),
    ],
)
def test_for_a_random_crop_the_longer_side_stays_up_to_a_bound(tmp_path, shape, kept):
    read = read_picture(save(tmp_path / "a.png", noise(*shape)), SIDE, "random")
    assert read.pixels.shape == (*kept, 3)
    assert read.size == shape[::-1]
    if shape == (SIDE, 10 * SIDE):
        assert (read.pixels == noise(*shape)[:, 3 * SIDE : 7 * SIDE]).all()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=2), st.floats(0, 1, exclude_max=True))
def test_a_square_is_cut_at_its_place_and_inside_the_same_of_all_frames(shape, place):
    clip = np.stack([noise(*shape, seed=seed) for seed in range(2)])
    side, spare = min(shape), abs(shape[0] - shape[1])
    spot = min(int(place * (spare + 1)), spare)
    along = clip[:, spot:] if shape[0] > shape[1] else clip[:, :, spot:]
    square = Resolution(side, side)
    assert (cut_out(clip, square, place) == along[:, :side, :side]).all()
    assert (cut_out(clip[1], square, place) == along[1, :side, :side]).all()


def test_a_large_jpeg_is_shrunk_as_well_as_a_png(tmp_path):
    y, x = np.mgrid[0:1024, 0:1024] / 1024
    pixels = (np.stack([np.sin(9 * x), np.cos(7 * y), x * y], -1) * 100 + 128).astype(np.uint8)
    png = read_picture(save(tmp_path / "a.png", pixels), 32)
    jpeg = read_picture(save(tmp_path / "a.jpg", pixels, quality=95), 32)
    assert png.size == jpeg.size == (1024, 1024)
    assert np.abs(png.pixels.astype(int) - jpeg.pixels).mean() < 2


@pytest.mark.parametrize("form", ["PNG", "AVIF", "TIFF", "lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation, form):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:4, :8] = RED
    stored = {  # how a camera stores what `orientation` turns upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {
        "PNG": {"exif": exif},
        "AVIF": {"exif": exif, "quality": 100, "subsampling": "4:4:4"},
        "TIFF": {"tiffinfo": {0x0112: orientation}},
        "lzw": {"tiffinfo": {0x0112: orientation}, "compression": "tiff_lzw"},
    }
    kind = "TIFF" if form == "lzw" else form
    save(tmp_path / "a", np.ascontiguousarray(stored), format=kind, **options[form])
    assert (read_picture(tmp_path / "a", 16).pixels == upright).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    later = [Image.new("RGB", (16, 16), WHITE)]
    for form in ("GIF", "TIFF", "AVIF", "WEBP"):
        options = {"save_all": True, "append_images": later, "format": form}
        save(tmp_path / "a", np.full((16, 16, 3), RED, np.uint8), **options)
        assert middle(tmp_path / "a") == pytest.approx(RED, abs=4), form


def test_a_heic_is_read_upright_or_its_extra_is_named(monkeypatch):
    path = Path(__file__).parent / "data" / "turned.heic"
    picture = read_picture(path, 48)
    assert picture.size == (64, 48)
    assert picture.pixels[4, 4] == pytest.approx(RED, abs=8)
    assert picture.pixels[4, 40].min() > picture.pixels[40, 4].min() - 4 > 240
    whole = path.read_bytes()
    for length in (20, 100, len(whole) // 2, len(whole) - 20):
        with pytest.raises(PictureError):
            read_picture(whole[:length], 16)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(PictureError, match=r"pip install .matryoshka-diffusion\[heic\]"):
        read_picture(path, 48)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_tiff_of_any_mode_and_compression_looks_alike(tmp_path, mode, compression):
    colour = (204, 204, 204)  # which the usual palette has
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 204 * 257, np.uint16))
    else:
        image = Image.new("RGB", (16, 16), colour if mode != "1" else WHITE).convert(mode)
    image.save(tmp_path / "a.tif", compression=compression)
    assert middle(tmp_path / "a.tif") == pytest.approx(WHITE if mode == "1" else colour, abs=4)


@pytest.mark.parametrize(("kind", "value"), [("float32", 0.5), ("int32", 2**20)])
def test_numbers_of_32_bits_have_no_known_range(tmp_path, kind, value):
    save(tmp_path / "a.tif", np.full((16, 16), value, kind))
    with pytest.raises(PictureError, match="32 bits"):
        read_picture(tmp_path / "a.tif", 16)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    save(tmp_path / "grey.png", np.full((16, 16), 100 * 257, np.uint16))
    assert middle(tmp_path / "grey.png") == (100, 100, 100)
    row = b"\0" + struct.pack(">3H", *(value * 257 for value in RED)) * 16
    (tmp_path / "rgb.png").write_bytes(png_bytes(16, 16, row * 16, depth=16, colour=2))
    assert middle(tmp_path / "rgb.png") == RED


@pytest.mark.parametrize(
    ("form", "mode", "stored"),
    [
        ("PNG", "RGB", (173, 62, 62)),
        ("PNG", "RGBA", (173, 62, 62, 255)),
        ("PNG", "P", (173, 62, 62)),
        ("JPEG", "RGB", (173, 62, 62)),
        ("WEBP", "RGB", (173, 62, 62)),
    ],
)
def test_colours_of_another_space_become_srgb(tmp_path, form, mode, stored):
    image = Image.new("RGBA" if mode == "RGBA" else "RGB", (24, 24), stored)
    image = image.quantize(2) if mode == "P" else image
    profile = icc_profile("RGB", 2.2, ADOBE)
    image.save(tmp_path / "a", form, icc_profile=profile, quality=100, lossless=True)
    assert middle(tmp_path / "a") == pytest.approx((200, 60, 60), abs=2)


@pytest.mark.parametrize("bits", [8, 16])
def test_greys_of_another_gamma_become_srgb(tmp_path, bits):
    pixels = np.full((16, 16), 55 if bits == 8 else 55 * 257, f"uint{bits}")
    save(tmp_path / "a.png", pixels, icc_profile=icc_profile("GRAY", 1.0))
    assert middle(tmp_path / "a.png") == pytest.approx((128, 128, 128), abs=2)


@pytest.mark.parametrize("kind", ["sRGB", "of another mode", "damaged", "too large"])
def test_a_profile_that_says_nothing_changes_no_number(tmp_path, kind):
    adobe = icc_profile("RGB", 2.2, ADOBE)
    profile = {
        "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "of another mode": icc_profile("GRAY", 1.0),
        "damaged": adobe[:200],
        "too large": adobe + bytes(5 * 2**20),
    }[kind]
    pixels = noise(16)
    save(tmp_path / "a.webp", pixels, lossless=True, icc_profile=profile)
    assert (read_picture(tmp_path / "a.webp", 16).pixels == pixels).all()


def packed(size: int) -> bytes:
    packer = zlib.compressobj()
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size)) + packer.flush()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on damaged EXIF data
@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"k\0\0" + packed(2)),
        chunk(b"iTXt", b"k\0\1\0\0\0" + packed(2)),
        chunk(b"iCCP", b"k\0\0" + packed(2)),
        chunk(b"iCCP", b"k\0\7" + packed(0)),
        chunk(b"iCCP", b"k"),
        chunk(b"tEXt", b"k\0" + bytes(2**20)) * 65,
        chunk(b"tEXt", b"k\0v")[:-1] + b"?",
        chunk(b"eXIf", b"II*\0nothing"),
        chunk(b"pHYs", b"2"),
    ],
    ids=range(9),
)
def test_text_and_profiles_of_a_png_never_condemn_its_pixels(tmp_path, metadata):
    """They may be too large, damaged or unknown; what is whole beside them counts."""
    exif = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0) + bytes(4)
    adobe = chunk(b"iCCP", b"k\0\0" + zlib.compress(icc_profile("RGB", 2.2, ADOBE)))
    extra = metadata + (b"" if b"iCCP" in metadata[:8] else adobe)
    extra += b"" if b"eXIf" in metadata[:8] else chunk(b"eXIf", exif)
    rows = (b"\0" + bytes((173, 62, 62)) * 16) * 12 + (b"\0" + bytes((255, 255, 255)) * 16) * 4
    (tmp_path / "a.png").write_bytes(png_bytes(16, 16, rows, extra=extra))
    pixels = read_picture(tmp_path / "a.png", 16).pixels
    turned, managed = b"eXIf" not in metadata[:8], b"iCCP" not in metadata[:8]
    assert pixels[0 if turned else -1].min() == 255
    expected = (200, 60, 60) if managed else (173, 62, 62)
    assert pixels[8, 8].tolist() == pytest.approx(expected, abs=2)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on damaged EXIF data
@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\xff\xff\xff\xff\xff"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(20)),
        (0xE2, b"ICC_PROFILE\0\3\x09half"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    ],
    ids=range(7),
)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_segments_of_a_jpeg_never_condemn_its_pixels(tmp_path, marker, data, mode):
    Image.new("RGB", (24, 24), RED).convert(mode).save(tmp_path / "a", "JPEG", quality=100)
    whole = (tmp_path / "a").read_bytes()
    segment = struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data
    (tmp_path / "a").write_bytes(whole[:2] + segment + whole[2:])
    assert middle(tmp_path / "a") == pytest.approx(RED, abs=4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on damaged EXIF data
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_of_exif_only_the_orientation_counts(tmp_path, form):
    """A signed resolution with a divisor of zero, which Pillow can read and not write."""
    exif = b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)
    exif += struct.pack("<HHII", 0x011A, 10, 1, 38) + bytes(4) + struct.pack("<ii", -1, 0)
    pixels = np.full((16, 16, 3), RED, np.uint8)
    pixels[12:] = 255
    save(tmp_path / "a", pixels, format=form, exif=b"Exif\0\0" + exif)
    found = read_picture(tmp_path / "a", 16).pixels
    assert found[0].min() > 240
    assert found[15].min() < 100


@pytest.mark.parametrize(
    ("depth", "colour", "numbers"),
    [(1, 0, [1]), (2, 0, [1]), (4, 0, [3]), (8, 0, [10]), (16, 0, [10]), (16, 2, [1000, 77, 9])],
)
@pytest.mark.parametrize("transparent", [True, False])
def test_a_transparent_colour_of_any_depth_is_white(depth, colour, numbers, transparent):
    row = "".join(f"{number:0{depth}b}" for number in numbers * 16)
    rows = (b"\0" + int(row, 2).to_bytes(len(row) // 8, "big")) * 16
    clear = chunk(b"tRNS", struct.pack(f">{len(numbers)}H", *numbers))
    extra = clear if transparent else b""
    pixels = read_picture(png_bytes(16, 16, rows, depth, colour, extra), 16).pixels
    assert (pixels.min() == 255) == (transparent or depth == 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "half"])
def test_what_is_transparent_is_white(tmp_path, mode):
    clear = Image.new("RGBA", (16, 16), (10, 10, 10, 128 if mode == "half" else 0))
    if mode == "P":
        clear = Image.new("P", (16, 16), 3)
        clear.putpalette(bytes(range(256)) * 3)
    transparency: dict[str, Any] = {"P": 3, "RGB": (10, 10, 10)}
    options = {"transparency": transparency[mode]} if mode in transparency else {}
    (clear if mode == "half" else clear.convert(mode)).save(tmp_path / "a.png", **options)
    expected = 132 if mode == "half" else 255
    assert max(abs(value - expected) for value in middle(tmp_path / "a.png")) <= (mode == "half")


# --- bounds and damage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(50_000, 50_000), (20_001, 20), (9_000, 8_000), (12_000, 12_000), (2**31 - 1, 16)]
)
def test_huge_pictures_are_refused_from_the_header(tmp_path, monkeypatch, size):
    (tmp_path / "a.png").write_bytes(png_bytes(size[0], size[1], b"", depth=1, colour=0))
    later = Image.new("RGB", (16, 16), WHITE)
    webp = save(tmp_path / "a.webp", noise(16), save_all=True, append_images=[later])
    data = bytearray(webp.read_bytes())
    canvas = data.index(b"VP8X") + 12
    for position, length in ((canvas, size[0]), (canvas + 3, size[1])):
        data[position : position + 3] = (min(length, 2**24) - 1).to_bytes(3, "little")
    webp.write_bytes(data)
    jpeg = save(tmp_path / "a.jpg")
    data = bytearray(jpeg.read_bytes())
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = struct.pack(">HH", *(min(length, 2**16 - 1) for length in size))
    jpeg.write_bytes(data)
    others = [huge(tmp_path, form, size) for form in ("GIF", "BMP", "TIFF", "AVIF")]
    save(tmp_path / "long.avif", np.zeros((8, 20_008, 3), np.uint8))

    def allocate(*_):
        raise AssertionError("pixels were allocated")

    monkeypatch.setattr(ImageFile.ImageFile, "load", allocate)
    for path in (tmp_path / "a.png", webp, jpeg, *others, tmp_path / "long.avif"):
        reason = "at its start|too large" if path.name == "a.avif" else "too large"
        with pytest.raises(PictureError, match=reason):
            read_picture(path, 16)


def huge(folder: Path, form: str, size: tuple[int, int]) -> Path:
    """A small file whose header promises a picture of this size, as far as its numbers go."""
    path = save(folder / f"a.{form.lower()}", noise(16), format=form)
    data = bytearray(path.read_bytes())
    if form == "GIF":
        data[6:10] = struct.pack("<HH", *(min(length, 2**16 - 1) for length in size))
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", *size)
    elif form == "AVIF":  # whose decoder refuses some of these by itself
        data[(box := data.index(b"ispe") + 8) : box + 8] = struct.pack(">II", *size)
    else:
        for tag, length in zip((256, 257), size, strict=True):
            place = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
            data[place : place + 4] = struct.pack("<I", length)
    path.write_bytes(data)
    return path


def test_many_comments_of_a_gif_take_no_time(tmp_path):
    whole = save(tmp_path / "a.gif", noise(16)).read_bytes()
    place = 13 + 3 * 2 ** (whole[10] % 8 + 1)  # after the palette

    def commented(blocks: int) -> bytes:
        comment = b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0"
        return whole[:place] + comment + whole[place:]

    plain = read_picture(whole, 16).pixels
    assert (read_picture(commented(1_000), 16).pixels == plain).all()
    with pytest.raises(PictureError, match="comments"):
        read_picture(commented(200_000), 16)
    with pytest.raises(PictureError):
        read_picture(commented(1)[: place + 20], 16)


def test_many_texts_do_not_fill_the_memory(tmp_path):
    texts = chunk(b"tEXt", b"k\0" + bytes(2**20 - 2)) * 65
    (tmp_path / "a.png").write_bytes(png_bytes(16, 16, bytes(16 * 49), extra=texts))
    tracemalloc.start()
    try:
        assert not read_picture(tmp_path / "a.png", 16).pixels.any()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_file_beyond_all_reason_is_not_opened(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(300 * 10**6)  # sparse
    with pytest.raises(PictureError, match="larger than 256 MB"):
        read_picture(tmp_path / "a.png", 16)


@pytest.mark.parametrize("form", ["TGA", "ICO", "PCX", "PPM", ""])
def test_other_formats_are_refused_whatever_their_name(tmp_path, form):
    if form:
        save(tmp_path / "a.png", format=form)
    else:
        (tmp_path / "a.png").touch()
    with pytest.raises(PictureError, match="not PNG, JPEG, WEBP" if form else "empty"):
        read_picture(tmp_path / "a.png", 16)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its remarks on damaged EXIF data
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_damaged_files_give_a_reason_or_a_picture_and_never_anything_else(tmp_path, form):
    info = PngImagePlugin.PngInfo()
    info.add_text("key", "value", zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"pnginfo": info} if form == "PNG" else {}
    options |= {"exif": exif} if form not in ("GIF", "BMP") else {}
    whole = save(tmp_path / "a.png", noise(24), format=form, **options).read_bytes()
    for length in range(0, len(whole) - 30, max(1, len(whole) // 60)):
        with pytest.raises(PictureError):
            read_picture(whole[:length], 16)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(0, min(len(whole), 400), random.integers(1, 4)):
            damaged[position] = random.integers(256)
        with contextlib.suppress(PictureError):
            assert read_picture(bytes(damaged), 16).pixels.shape == (16, 16, 3)
