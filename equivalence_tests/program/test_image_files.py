"""Decoding of one image file: modes, depths, orientation, and files that are no images."""

import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from equivalence_tests.program.image_folder import encoded, picture, tiff, upright
from flax_resnet.data import image_files
from flax_resnet.data.image_files import decode_image, is_turned
from flax_resnet.data.sources import read_image
from flax_resnet.errors import InputError


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK"])
def test_read_image_modes(tmp_path, mode, suffix):
    path = tmp_path / f"image{suffix}"
    try:
        picture(mode=mode).save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no {mode}")
    reference = Image.open(path).convert("RGB")  # torchvision's ImageFolder
    color, gray = read_image(path, 3), read_image(path, 1)
    assert color.shape == (12, 9, 3) and gray.shape == (12, 9, 1) and gray.dtype == np.uint8
    np.testing.assert_array_equal(color, np.asarray(reference))
    np.testing.assert_array_equal(gray[..., 0], np.asarray(reference.convert("L")))


def test_read_image_scales_16_bits(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 1)[..., 0], levels)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 3)[..., 2], levels)


LEVELS = np.arange(256).reshape(16, 16)


def pgm(maxval, samples, dtype=">u2", magic="P5"):
    return f"{magic} 16 16 {maxval}\n".encode() + samples.astype(dtype).tobytes()


def packed(samples):
    """Samples of 12 bits, packed two in three bytes."""
    left, right = samples[:, ::2], samples[:, 1::2]
    parts = [left >> 4, (left & 15) << 4 | right >> 8, right & 255]
    return np.stack(parts, -1).reshape(len(samples), -1).astype(np.uint8)


AS_SHOWN = {
    "32 bits with 8 used": tiff(LEVELS.astype("<u4"), 32),
    "signed 32 bits with 8 used": tiff(LEVELS.astype("<i4"), 32, {339: 2}),
    "signed 32 bits with 16 used": tiff(LEVELS.astype("<i4") * 257, 32, {339: 2}),
    "16 bits": tiff(LEVELS.astype("<u2") * 257),
    "16 bits, high byte first": tiff(LEVELS.astype(">u2") * 257, order=">"),
    "16 bits, white is zero": tiff(0xFFFF - LEVELS.astype("<u2") * 257, tags={262: 0}),
    "8 bits, white is zero": tiff(255 - LEVELS.astype("u1"), 8, {262: 0}),
    "12 bits of 16 by the tag": tiff(LEVELS.astype("<u2") * 16, tags={281: 4095}),
    "10 bits of 16 by the tag": tiff(LEVELS.astype("<u2") * 4, tags={281: 1023}),
    "12 bits packed": tiff(packed(LEVELS * 16), 12, {256: 16}),
    "PGM of 8 bits": pgm(255, LEVELS, "u1"),
    "PGM of 12 bits": pgm(4095, LEVELS * 16),
    "PGM of 16 bits": pgm(65535, LEVELS * 257),
    "PNG of 16 bits": encoded(Image.fromarray(LEVELS.astype(np.uint16) * 257), format="PNG"),
    "black, of 16 bits": tiff(np.zeros((16, 16), "<u2")),
}


@pytest.mark.parametrize("kind", AS_SHOWN)
def test_gray_is_as_bright_as_its_file_says(kind):
    """Brightness follows the file's tags; PIL would clip."""
    image = decode_image(io.BytesIO(AS_SHOWN[kind]), 1, name=kind)[..., 0]
    expected = 0 * LEVELS if "black" in kind else LEVELS
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA"])
def test_a_turned_tiff_is_upright(tmp_path, mode):
    """Pillow turns a TIFF by itself."""
    depth = np.uint16 if mode == "I;16" else np.uint8
    gray = (np.arange(24 * 32).reshape(24, 32) // 4 * (257 if mode == "I;16" else 1)).astype(depth)
    picture = Image.fromarray(gray)
    picture = picture if mode in ("L", "I;16") else picture.convert(mode)
    picture.save(tmp_path / "a.tif", tiffinfo={274: 6})
    image = read_image(tmp_path / "a.tif", 1)[..., 0]
    np.testing.assert_array_equal(image, np.rot90(gray // (257 if mode == "I;16" else 1), -1))


DEEP_COLOURS = np.stack([LEVELS * 16] * 3, -1)
NOT_SAID = {
    "12 bits of 16": tiff(LEVELS.astype("<u2") * 16),
    "10 bits of 16": tiff(LEVELS.astype("<u2") * 4),
    "8 bits of 16": tiff(LEVELS.astype("<u2")),
    "a statistic and no depth": tiff(LEVELS.astype("<u2") * 16, tags={281: 4080}),
    "12 bits of 32": tiff(LEVELS.astype("<u4") * 16, 32),
    "20 bits of 32": tiff(LEVELS.astype("<u4") * 4096, 32),
    "more than the tag says": tiff(LEVELS.astype("<u2") * 257, tags={281: 4095}),
    "signed 16 bits": tiff(LEVELS.astype("<i2") * 128, tags={339: 2}),
    "signed 8 bits": tiff(LEVELS.astype("u1"), 8, {339: 2}),
    "negative": tiff(LEVELS.astype("<i4") - 9, 32, {339: 2}),
    "half precision": tiff((LEVELS / 255).astype("<f2"), tags={339: 3}),
    "white is zero, high byte first": tiff(LEVELS.astype(">u2") * 257, tags={262: 0}, order=">"),
    "12 bits of 16 in a PNG": encoded(Image.fromarray(LEVELS.astype("<u2") * 16), format="PNG"),
    "12 bits of 16 in a PGM": pgm(65535, LEVELS * 16),
    "12 bits of 16 in a PPM": pgm(65535, DEEP_COLOURS, magic="P6"),
}


@pytest.mark.parametrize("kind", NOT_SAID)
def test_gray_of_a_depth_that_is_not_known_is_refused(kind):
    """Decoded, the image would be nearly black or another one."""
    with pytest.raises(InputError, match="not a readable image .*(bits|signed|TIFF)"):
        decode_image(io.BytesIO(NOT_SAID[kind]), 1, name=kind)


@pytest.mark.parametrize("factor", [1, 16])
def test_colours_of_12_bits_are_refused_for_what_they_are(factor):
    """Pillow drops the low bytes of samples; samples above 12 bits are refused too."""
    pixels = (DEEP_COLOURS * factor).astype("<u2")
    content = tiff(pixels, tags={262: 2, 277: 3, 281: 4095})
    with pytest.raises(InputError, match="its colours have 12 of 16 bits"):
        decode_image(io.BytesIO(content), 3, name="x")


def test_a_palette_of_8_bits_where_16_belong_is_refused():
    """All colours would be black."""
    file = encoded(picture(mode="P"), format="TIFF")
    with Image.open(io.BytesIO(file)) as image:
        colours = np.array(image.tag_v2[320], "<u2").tobytes()
    assert file.count(colours) == 1
    dark = (np.frombuffer(colours, "<u2") >> 8).astype("<u2").tobytes()
    with pytest.raises(InputError, match="palette"):
        decode_image(io.BytesIO(file.replace(colours, dark)), 3, name="palette.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_upright_on_request(tmp_path, suffix, orientation):
    """Images are turned as viewers do; PIL always turns a TIFF."""
    path = tmp_path / f"image.{suffix}"
    picture(size=(24, 16)).save(path, exif=upright(orientation))
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        as_it_is = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(image_files.read_image(path, 3, exif_transpose=True), expected)
    np.testing.assert_array_equal(image_files.read_image(path, 3), as_it_is)
    assert is_turned(path) == (orientation > 1 and suffix != "tif")


def test_an_image_with_broken_exif_is_upright(tmp_path):
    picture().save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*" + bytes(3))
    assert not is_turned(tmp_path / "odd.jpg") and not is_turned(tmp_path / "none.jpg")
    assert image_files.read_image(tmp_path / "odd.jpg", 3, exif_transpose=True).shape == (12, 9, 3)


def test_large_images_are_decoded_one_after_another(monkeypatch):
    """Threads do not decode large images at once; a file of 10 KiB can take a gigabyte."""
    monkeypatch.setattr(image_files, "MEMORY", image_files._Budget(3 * 400 * 400 * 16))
    file = encoded(Image.new("1", (400, 400)), format="PNG")
    given_back = mock.Mock()
    monkeypatch.setattr(image_files, "_give_back", given_back)
    monkeypatch.setattr(image_files, "_LARGE", 400 * 400)
    most, now, lock = [0], [0], threading.Lock()
    convert = image_files._convert

    def counted(*arguments):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return convert(*arguments)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(image_files, "_convert", counted)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: decode_image(io.BytesIO(file), 3, name="x"), range(64)))
    assert 1 <= most[0] <= 3
    assert image_files.MEMORY._used == 0 and given_back.call_count == 64


def test_the_name_of_a_bad_file_is_safe_to_print():
    with pytest.raises(InputError) as error:
        decode_image(io.BytesIO(b""), 3, name="a\x1b[31m\u202egpj.exe")
    assert "\x1b" not in str(error.value) and "\\u202e" in str(error.value)


def test_read_image_refuses_pixels_without_a_range(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    for name in ("float.tif", "deep.tif"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            read_image(tmp_path / name, 3)


def test_read_image_transparent_palette_and_exif(tmp_path):
    palette = picture(mode="P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture().save(tmp_path / "turned.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        color = read_image(tmp_path / "palette.png", 3)
        assert read_image(tmp_path / "turned.jpg", 3).shape == (12, 9, 3)
    np.testing.assert_array_equal(color, np.asarray(palette.convert("RGB")))


def test_read_image_first_frame(tmp_path):
    frames = [picture(seed, mode="P") for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(
        read_image(tmp_path / "moving.gif", 3), np.asarray(frames[0].convert("RGB"))
    )


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "short.jpg": encoded(picture(size=(64, 64)), format="JPEG")[:-900],
    "short.png": encoded(picture(size=(64, 64)), format="PNG")[:-900],
}


def test_read_image_leaves_other_decoders_alone(tmp_path):
    (tmp_path / "script.png").write_bytes(encoded(picture(), format="EPS"))
    with pytest.raises(InputError, match="no known format"):  # and no Ghostscript started
        read_image(tmp_path / "script.png", 3)


@pytest.mark.parametrize("name", BROKEN)
def test_read_image_broken(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(InputError, match=f"{tmp_path / name}: not a readable image \\(.+\\)$"):
        read_image(tmp_path / name, 3)


def test_read_image_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "folder.png").mkdir()
    reasons = {"folder.png": "a folder", "pipe.png": "no regular file"}
    for name in ("pipe.png", "gone.png", "missing.png", "folder.png"):
        assert not is_turned(tmp_path / name)
        why = reasons.get(name, "no such file")
        with pytest.raises(InputError, match=rf"{name}: not a readable image \({why}\)"):
            read_image(tmp_path / name, 3)


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_a_line_is_no_picture(tmp_path, size):
    """Scaled to a shorter side of 224 pixels, a line of pixels would fill the memory."""
    picture(size=size).save(tmp_path / "line.png")
    with pytest.raises(InputError, match="line.png: not a readable image .*a line"):
        read_image(tmp_path / "line.png", 3)


@pytest.mark.parametrize("limit", [100, 60, 20])  # PIL: fine, a warning, an error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_read_image_decompression_bomb(tmp_path, monkeypatch, limit):
    picture(size=(10, 10)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 100:
        assert read_image(tmp_path / "bomb.png", 3).shape == (10, 10, 3)
    else:
        with pytest.raises(InputError, match="bomb.png: not a readable image .*pixels"):
            read_image(tmp_path / "bomb.png", 3)
