"""One image file: modes, depths, orientation, and everything that is none."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.image_folder import encoded, picture
from flax_resnet.config import InputError
from flax_resnet.data.sources import read_image


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
    for name in ("pipe.png", "gone.png", "missing.png"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            read_image(tmp_path / name, 3)


@pytest.mark.parametrize("size", [(1, 201), (402, 2)])
def test_a_line_is_no_picture(tmp_path, size):
    """Scaled until its shorter side is 224 pixels it would fill the memory."""
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
