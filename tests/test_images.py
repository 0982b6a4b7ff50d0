import io
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opensan.config import ImageConfig
from opensan.images import ImageError, image_size, list_images, network_size, open_image, prepare, stored_size

CONFIG = ImageConfig()
PHOTO = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(call) -> str:
    with pytest.raises(ImageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly any pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100)))):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray(PHOTO), "PNG"),
        bytearray(encoded(Image.fromarray(PHOTO), "BMP")),
        encoded(Image.fromarray(PHOTO), "TIFF"),
        encoded(Image.fromarray(PHOTO), "PPM"),
        encoded(Image.fromarray(PHOTO), "WEBP", lossless=True),
        Image.fromarray(PHOTO),
        PHOTO,
        np.asfortranarray(PHOTO),
        PHOTO[:, ::-1][:, ::-1],
        torch.from_numpy(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
    ],
    ids=["png", "bmp", "tiff", "ppm", "webp", "pil", "numpy", "fortran", "strided", "torch-hwc", "torch-chw"],
)
def test_every_kind_of_source_gives_the_same_pixels(source):
    image = open_image(source)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, PHOTO)


def test_path_as_text_or_object(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(PHOTO).save(path)
    np.testing.assert_array_equal(open_image(path), PHOTO)
    np.testing.assert_array_equal(open_image(str(path)), PHOTO)


def test_the_callers_buffer_is_copied():
    frame = PHOTO.copy()
    image = open_image(frame)
    frame[:] = 0
    np.testing.assert_array_equal(image, PHOTO)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_applied(orientation, kind):
    # How the stored pixels must be turned to stand upright (EXIF 2.3, tag 0x0112).
    upright = {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO, -1),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PHOTO), kind, exif=exif)
    np.testing.assert_array_equal(open_image(data), upright)
    np.testing.assert_array_equal(open_image(Image.open(io.BytesIO(data))), upright)
    size, turn = stored_size(data)
    assert size == PHOTO.shape[:2]
    turned = PHOTO if turn is None else np.asarray(Image.fromarray(PHOTO).transpose(turn))
    np.testing.assert_array_equal(turned, upright)


def test_stored_size_of_what_is_no_photograph(tmp_path):
    assert error_of(lambda: stored_size(tmp_path / "none.jpg")).endswith(
        "none.jpg: can't be read (No such file or directory)"
    )
    assert "the file is empty" in error_of(lambda: stored_size(b""))
    assert "more than the limit" in error_of(lambda: stored_size(png_header(100_000, 100_000)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_photograph():
    data = encoded(Image.fromarray(PHOTO), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(open_image(data), PHOTO)


def test_grey_of_8_and_16_bits():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expect = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(open_image(grey), expect)
    np.testing.assert_array_equal(open_image(encoded(Image.fromarray(grey), "PNG")), expect)
    deep = grey.astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(open_image(encoded(Image.fromarray(deep), kind)), expect)
    np.testing.assert_array_equal(
        open_image(encoded(Image.fromarray(deep + (deep < 65_000).astype(np.uint16) * 120), "PNG")), expect
    )
    pgm = b"P5 16 16 65535\n" + deep.astype(">u2").tobytes()
    np.testing.assert_array_equal(open_image(pgm), expect)


def test_one_bit_palette_and_cmyk():
    bits = np.array([[True, False, True]])
    np.testing.assert_array_equal(open_image(Image.fromarray(bits))[0, :, 0], [255, 0, 255])
    palette = Image.fromarray(PHOTO).quantize(16)
    np.testing.assert_array_equal(open_image(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    cmyk = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    red = open_image(encoded(cmyk, "JPEG")).astype(int)
    assert red.shape == (3, 4, 3)
    assert (red[..., 0] > 245).all() and (red[..., 1:] < 10).all()


def test_transparency_is_laid_on_white():
    rgba = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(open_image(rgba), PHOTO)
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 51
    expect = PHOTO.astype(float)
    expect[0] = 255
    expect[1] = PHOTO[1] * 0.2 + 255 * 0.8
    for source in (rgba, encoded(Image.fromarray(rgba), "PNG")):
        np.testing.assert_allclose(open_image(source), expect, atol=1)
    grey_alpha = Image.merge("LA", (Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)))
    assert (open_image(encoded(grey_alpha, "PNG")) == 255).all()
    palette = Image.fromarray(PHOTO).quantize(4)
    assert (open_image(encoded(palette, "PNG", transparency=bytes(4))) == 255).all()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (open_image(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (20_000, 20)])
def test_thin_images(shape):
    image = np.full((*shape, 3), 7, np.uint8)
    np.testing.assert_array_equal(open_image(encoded(Image.fromarray(image), "PNG")), image)
    prepared = prepare(image, CONFIG)
    assert max(prepared.sizes.network) <= CONFIG.long_side
    assert min(prepared.sizes.network) >= 1


def test_the_pixel_limit_is_read_from_the_header_and_can_be_raised(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(30_000, 20_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = error_of(lambda: open_image(path))
        assert message == (
            f"{path}: 30000 x 20000 is 600,000,000 pixels, more than the limit of 100,000,000; "
            "raise it with max_pixels=600000000 (--max-pixels 600000000)"
        )
    assert "more than the limit" in error_of(lambda: open_image(PHOTO, max_pixels=53))
    assert open_image(PHOTO, max_pixels=54).shape == PHOTO.shape


def test_pillows_limit_is_lifted_for_us_and_left_as_it_was(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # alone, Pillow would refuse more than twice this
    sources = [encoded(Image.fromarray(PHOTO), kind) for kind in ("PNG", "TIFF", "WEBP", "GIF")] * 10
    with ThreadPoolExecutor(8) as pool:
        assert all(image.shape == PHOTO.shape for image in pool.map(open_image, sources))
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000"])
def test_truncated_files(kind, tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut"
    for share in (0.02, 0.3, 0.7):
        path.write_bytes(data[: int(len(data) * share)])
        assert str(path) in error_of(lambda: open_image(path))


@given(st.binary(max_size=60), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM"]), st.integers(0, 200))
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_scribbled_bytes_give_an_image_or_one_line(scribble, kind, where):
    data = bytearray(encoded(Image.fromarray(PHOTO), kind))
    data[where : where + len(scribble)] = scribble
    try:
        image = open_image(bytes(data), max_pixels=10_000)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_what_is_not_an_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert error_of(lambda: open_image(tmp_path / "empty.jpg")) == f"{tmp_path / 'empty.jpg'}: the file is empty"
    (tmp_path / "bands.TIF").write_bytes(b"of a kind that Pillow does not know")
    assert "damaged at the start; `opensan segment-raster`" in error_of(lambda: open_image(tmp_path / "bands.TIF"))
    (tmp_path / "text.jpg").write_text("hello\n")
    assert "text.jpg: not an image" in error_of(lambda: open_image(tmp_path / "text.jpg"))
    assert "Is a directory" in error_of(lambda: open_image(tmp_path))
    assert "No such file" in error_of(lambda: open_image(str(tmp_path / "none.jpg")))
    assert "not a file name" in error_of(lambda: open_image("a\0b"))
    assert "empty" in error_of(lambda: open_image(b""))
    for url in ("https://example.org/a.jpg", "data:image/png;base64,xyz"):
        assert "URLs are not fetched; download it first" in error_of(lambda url=url: open_image(url))
    assert "No such file" in error_of(lambda: open_image(f"file://{tmp_path}/none.jpg"))  # a file of this machine
    assert "not dict" in error_of(lambda: open_image({}))


def test_postscript_is_never_interpreted():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert "not an image" in error_of(lambda: open_image(eps))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_images_without_pixels(size):
    assert "no pixels" in error_of(lambda: open_image(np.zeros((*size, 3), np.uint8)))
    assert "no pixels" in error_of(lambda: open_image(Image.new("RGB", size)))
    error_of(lambda: open_image(png_header(*size)))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 5, 3)), "floats in [0, 1]"),
        (torch.zeros(3, 4, 5), "floats in [0, 1]"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), "floats in [0, 1]"),
        (np.zeros((4, 5, 3), np.int64), "must be uint8"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((2, 4, 5, 3), np.uint8), "a list of images"),
        (np.zeros(5, np.uint8), "the shape must be"),
    ],
)
def test_unusable_arrays(array, says):
    assert says in error_of(lambda: open_image(array))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range(mode):
    assert "no known range" in error_of(lambda: open_image(encoded(Image.new(mode, (3, 3)), "TIFF")))


@pytest.mark.parametrize(
    ("image_size", "expect"),
    [
        ((480, 640), (640, 853)),
        ((640, 480), (853, 640)),
        ((640, 640), (640, 640)),
        ((426, 640), (640, 962)),  # 961.50 rounds up
        ((100, 1000), (256, 2560)),
        ((20_000, 20), (2560, 3)),
        ((1, 100_000), (1, 2560)),
        ((1, 1), (640, 640)),
    ],
)
def test_network_size_follows_the_official_resize(image_size, expect):
    assert network_size(image_size, CONFIG) == expect


@given(st.tuples(st.integers(1, 50_000), st.integers(1, 50_000)), st.integers(1, 900), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_network_sizes_keep_their_bounds(image_size, short_side, long_side):
    config = ImageConfig(short_side=short_side, long_side=long_side)
    height, width = network_size(image_size, config)
    assert min(height, width) >= 1
    assert max(height, width) <= long_side
    assert (width, height) == network_size(image_size[::-1], config)
    if max(image_size) * short_side <= min(image_size) * long_side:
        assert min(height, width) == short_side


def test_prepare_resizes_normalises_and_pads():
    config = ImageConfig(short_side=20, long_side=50)
    prepared = prepare(PHOTO, config)
    assert (prepared.sizes.image, prepared.sizes.network, prepared.sizes.padded) == ((6, 9), (20, 30), (32, 32))
    assert prepared.pixels.shape == (3, 32, 32) and prepared.pixels.dtype == torch.float32
    resized = np.asarray(Image.fromarray(PHOTO).resize((30, 20), Image.Resampling.BILINEAR), np.float32)
    expect = (resized - np.float32(config.mean)) / np.float32(config.std)
    np.testing.assert_array_equal(prepared.pixels[:, :20, :30].permute(1, 2, 0).numpy(), expect)
    assert not prepared.pixels[:, 20:].any() and not prepared.pixels[:, :, 30:].any()


def test_prepare_without_resize_keeps_the_scale_and_the_caller_s_array():
    image = PHOTO.copy()
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(image, CONFIG, resize=False)
    assert prepared.sizes.network == (6, 9) and prepared.sizes.padded == (32, 32)
    expect = (PHOTO[5, 8].astype(np.float32) - np.float32(CONFIG.mean)) / np.float32(CONFIG.std)
    np.testing.assert_array_equal(prepared.pixels[:, 5, 8].numpy(), expect)


def test_list_images_walks_folders_and_takes_files_as_named(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "b/note.txt", "b/.hidden.png", ".git/x.png", "a.tiff", "c.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list_images([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.tiff", "b/1.png", "b/2.JPG"]
    again = list_images([tmp_path / "c.dat", str(tmp_path / "b" / "2.JPG"), tmp_path])
    assert [path.name for path in again] == ["c.dat", "2.JPG", "a.tiff", "1.png"]


def test_list_images_says_what_is_wrong(tmp_path):
    assert "does not exist" in error_of(lambda: list_images([tmp_path / "none"]))
    assert "no images in this folder" in error_of(lambda: list_images([tmp_path]))
    assert "URLs" in error_of(lambda: list_images(["http://example.org/a.jpg"]))


def test_photographs_of_other_programs_are_not_passed_over_in_silence(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    for name in ("IMG_1.HEIC", "b.dng", "c.heic", "d.heic", "notes.txt", ".hidden.heic"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning) as caught:
        assert list_images([tmp_path]) == [tmp_path / "a.png"]
    says = f"{tmp_path}: left out, as their format can't be read: IMG_1.HEIC, b.dng, c.heic and 1 more"
    assert [str(warning.message) for warning in caught] == [says]


def test_an_unreadable_folder_is_an_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    (tmp_path / "photo.png").touch()
    code = (
        "import os, sys\n"
        "from opensan.images import ImageError, list_images\n"
        "if os.geteuid() == 0:\n"
        "    os.setuid(65534)\n"
        "try:\n    list_images([sys.argv[1]])\n"
        "except ImageError as error:\n    print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    answer = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"{Path(tmp_path, 'locked')}: the folder can't be listed (Permission denied)"


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_the_size_is_known_from_the_header(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert image_size(path) == open_image(path).shape[:2]
    with pytest.raises(ImageError, match=r"missing\.jpg: can't be read"):
        image_size(tmp_path / "missing.jpg")
