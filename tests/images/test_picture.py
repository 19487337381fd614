"""Pictures from outside: every mode, orientation and format comes out as a viewer shows it, or with a clear line."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff import images
from unidiff.images.picture import rgb
from unidiff.images.preprocess import Preprocess
from unidiff.scorers.pictures import pixels_of

GREY = np.array([[0, 64, 128, 255]], np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(given, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    found = rgb(given)
    assert found.mode == "RGB"
    return found.getpixel(at)  # type: ignore[return-value]


GREYS = {
    "L": Image.fromarray(GREY),
    "RGB": Image.fromarray(GREY).convert("RGB"),
    "16 bits": Image.fromarray(GREY.astype(np.uint16) * 257),
    "16 bits, other byte order": Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")),
    "I of 8 bits": Image.fromarray(GREY).convert("I"),
    "I of 16 bits": Image.fromarray(GREY.astype(np.int32) * 257),
    "F from 0 to 1": Image.fromarray((GREY / 255).astype(np.float32)),
    "F of 8 bits": Image.fromarray(GREY).convert("F"),
    "F of 16 bits": Image.fromarray(GREY.astype(np.float32) * 257),
    "LA": Image.fromarray(GREY).convert("LA"),
    "La": Image.fromarray(GREY).convert("LA").convert("La"),
    "P": Image.fromarray(GREY).convert("P"),
    "PA": Image.fromarray(GREY).convert("P").convert("PA"),
    "RGBa": Image.fromarray(GREY).convert("RGBA").convert("RGBa"),
    "RGBX": Image.fromarray(GREY).convert("RGB").convert("RGBX"),
    "CMYK": Image.fromarray(GREY).convert("RGB").convert("CMYK"),
    "YCbCr": Image.fromarray(GREY).convert("RGB").convert("YCbCr"),
    "HSV": Image.fromarray(GREY).convert("RGB").convert("HSV"),
}


@each("name", GREYS)
def test_a_grey_ramp_of_any_mode_is_the_same_ramp(name):
    found = rgb(GREYS[name])
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.stack([GREY] * 3, -1))


@each(
    ("name", "kind"),
    [("16 bits", "PNG"), ("16 bits", "TIFF"), ("I of 16 bits", "TIFF"), ("F from 0 to 1", "TIFF"), ("CMYK", "TIFF")],
)
def test_wide_numbers_in_files(name, kind):
    assert np.array_equal(np.asarray(rgb(saved(GREYS[name], kind)))[..., 0], GREY)


def test_a_picture_of_one_bit():
    assert np.asarray(rgb(Image.fromarray(GREY > 100)))[0, :, 0].tolist() == [0, 0, 255, 255]


@each("values", [[-1.0, 0.5], [0.0, 1.5], [0.0, float("nan")], [0.0, float("inf")], [0.0, 70000.0]])
def test_values_of_an_unknown_range_are_refused(values):
    with pytest.raises(ValueError, match=r"values of mode F go from .* scale them first"):
        rgb(Image.fromarray(np.array([values], np.float32)))
    with pytest.raises(ValueError, match="values of mode I go from -3 to 5"):
        rgb(Image.fromarray(np.array([[-3, 5]], np.int32)))


def clear_palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((0, 0), 0)
    return image


def test_what_is_transparent_is_laid_on_white():
    assert pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 51))) == (204, 204, 204)
    assert pixel(Image.new("LA", (4, 4), (10, 0))) == (255, 255, 255)
    for kind in ("PNG", "GIF"):
        file = saved(clear_palette(), kind, transparency=0)
        assert (pixel(file), pixel(file, (1, 1))) == ((255, 255, 255), (200, 0, 0))
    one_colour = saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixel(one_colour) == (255, 255, 255)
    assert pixel(saved(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 257 * 9]], np.uint16))
    assert np.asarray(rgb(saved(deep, "PNG", transparency=0)))[0, :, 0].tolist() == [255, 9]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(kind, tmp_path):
    lying = Image.new("RGB", (40, 20), "black")
    lying.paste("white", (0, 0, 20, 20))  # its left half is the top of the upright picture
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"photo.{kind.lower()}"
    lying.save(path, kind, exif=exif)
    for given in (path, str(path), path.read_bytes(), Image.open(path)):
        upright = np.asarray(rgb(given))
        assert upright.shape == (40, 20, 3) and upright[:15].min() > 250 and upright[25:].max() < 5
    with Image.open(path) as opened:
        assert np.asarray(Preprocess("squash", 16).image(opened))[:4].min() > 250
        assert images.to_pixels([opened]).shape == (1, 3, 40, 20)


def test_of_an_animation_the_first_picture():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "PNG", "TIFF"):
        assert pixel(saved(frames[0], kind, save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_a_picture_is_left_as_it_was():
    given = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    rgb(given)
    assert given.mode == "RGBA" and given.getpixel((0, 0)) == (0, 0, 0, 0)


def test_a_huge_picture_is_refused_before_it_is_read(monkeypatch, tmp_path, recwarn):
    path = tmp_path / "huge.png"
    Image.new("1", (300, 200)).save(path)
    for most in (59_999, 20_000):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match=rf"huge.png has more than {most:,} pixels; make it smaller"):
            rgb(path)
    assert not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert rgb(path).size == (300, 200)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
WHOLE = saved(Image.effect_noise((64, 64), 50), "PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture that can be read: formats are PNG, JPEG, WEBP"),
        (b"<svg/>", "is not a picture that can be read: formats are PNG, JPEG, WEBP"),
        (EPS, "is not a picture that can be read: formats are PNG, JPEG, WEBP"),
        (WHOLE[: len(WHOLE) // 2], "is not a picture that can be read"),
    ],
    ids=["empty", "svg", "eps", "cut off"],
)
def test_what_is_not_a_picture_is_named(content, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png {message}"):
        rgb(path)
    with pytest.raises(ValueError, match=f"a picture of {len(content)} bytes {message}"):
        rgb(content)


def test_paths_and_types(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist"):
        rgb(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        rgb(tmp_path)
    with pytest.raises(TypeError, match="a picture is a file's path, its bytes or a PIL image, not ndarray"):
        rgb(GREY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="formats are JPEG"):
        rgb(WHOLE, formats=("JPEG",))


@pytest.mark.parametrize("given", [Image.new("LA", (4, 4), (9, 0)), Image.new("RGBA", (4, 4), (9, 9, 9, 0))])
def test_tokenizers_rules_and_rewards_see_the_same(given, model, tmp_path):
    given = given.resize((64, 64))
    given.save(tmp_path / "a.png")
    white = Image.new("RGB", (64, 64), "white")
    for one in (given, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert model.prepare(one).tobytes() == white.tobytes()
    assert images.to_pixels([given]).min() == 1
    assert pixels_of(given).min() == 255
    assert Preprocess("crop", 64).image(given).tobytes() == white.tobytes()
    assert torch.equal(model.encode(["go", given])[1].tokens, model.encode(["go", white])[1].tokens)


def test_the_shipped_family_is_shown_the_whole_picture(model):
    photo = Image.new("RGB", (300, 100), "black")
    photo.paste("white", (0, 0, 150, 100))
    found = np.asarray(model.prepare(photo))
    assert found.shape == (64, 64, 3) and found[:, :28].min() > 250 and found[:, 36:].max() < 5


def test_a_pgm_file_says_its_own_range():
    dark = b"P5 2 1 65535\n" + np.array([257, 257 * 2], ">u2").tobytes()
    assert np.asarray(rgb(dark))[0, :, 0].tolist() == [1, 2]


@each(("mode", "size"), itertools.product(["RGB", "I", "F", "RGBA"], [(0, 0), (0, 5)]))
def test_a_picture_without_pixels_is_refused(mode, size):
    with pytest.raises(ValueError, match=rf"a picture of {size[0]} x {size[1]} pixels shows nothing"):
        rgb(Image.new(mode, size))


def test_an_opened_picture_that_is_damaged_is_refused_like_its_file():
    with pytest.raises(ValueError, match=r"the picture is not one that can be read .*truncated"):
        rgb(Image.open(io.BytesIO(WHOLE[:500])))


def test_a_name_that_cannot_be_a_file_is_not_there():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            rgb(name)


def test_a_picture_that_a_rule_would_enlarge_without_bound_is_refused():
    with pytest.raises(
        ValueError, match=r"1 x 30000 pixels is too long for its width: .* 512 x 15360000; cut it first"
    ):
        Preprocess("crop", 512).image(Image.new("RGB", (1, 30000)))
    assert Preprocess("crop", 64).image(Image.new("RGB", (1, 300))).size == (64, 64)
