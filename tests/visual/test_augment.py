"""Distortions keep the photo's form, grow with their strength, and are the same for the same seed everywhere."""

import io
import pickle
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageStat

import visual.augment
from config import Data, load_config
from errors import UserError
from paths import REPO_ROOT
from visual.augment import DISTORTIONS, STRENGTHS, Augment, distort

KINDS = list(DISTORTIONS)


def scene(width=320, height=240):
    """A picture with what photos have: light that falls off, edges, thin lines, a fine texture."""
    y, x = np.mgrid[0:height, 0:width]
    light = 60 + 120 * x / width + 40 * y / height
    texture = 6 * np.sin(x * 0.9) * np.sin(y * 1.1)
    pixels = np.stack([light + texture, light * 0.8, 230 - light], axis=-1)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 8, height // 4, width // 2, height * 3 // 4), fill=(200, 40, 30))
    pen.rectangle((width // 2, height // 8, width * 7 // 8, height // 2), fill=(30, 60, 160))
    for step in range(0, width, 160):
        pen.line((step, 0, width - step, height), fill=(240, 240, 230), width=2)
    return picture


def levels(picture):
    return np.asarray(picture, dtype=np.float64)


def difference(picture, other):
    """Mean absolute difference, in levels of 255."""
    return np.abs(levels(picture) - levels(other)).mean()


def at_size_of_encoder(picture):
    return picture.resize((224, 224), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    @pytest.mark.parametrize("size", [(320, 240), (1, 1), (2, 500), (500, 400), (70_000, 1)])
    def test_is_a_new_picture_of_the_same_form(self, kind, size):
        picture = scene(*size)
        before = picture.tobytes()
        for strength in STRENGTHS:
            distorted = distort(picture, kind, strength, 0)
            assert distorted is not picture
            assert (distorted.mode, distorted.size) == ("RGB", size)
            assert picture.tobytes() == before

    def test_grows_with_strength(self, kind):
        picture = scene()
        # mean of some seeds: what is drawn (places, angles) must not decide
        changes = [
            np.mean([difference(distort(picture, kind, strength, seed), picture) for seed in range(8)])
            for strength in STRENGTHS
        ]
        assert all(np.diff(changes) > 0), changes
        assert changes[0] > 0.5, "half a level cannot be seen"
        assert changes[4] > 1.5 * changes[0], changes

    def test_is_decided_by_the_seed(self, kind):
        picture = scene()
        drawn = [distort(picture, kind, 3, seed).tobytes() for seed in (5, 5, "5 a", "5 a")]
        assert drawn[0] == drawn[1]
        assert drawn[2] == drawn[3]
        different = {distort(picture, kind, 3, seed).tobytes() for seed in range(8)}
        assert (len(different) > 1) == (kind not in ("blur", "jpeg")), "these two have nothing to draw"

    def test_is_as_strong_on_a_large_photo(self, kind):
        """After the encoder's resize, a photo of four times the edges is distorted as the small one is."""
        small = scene(400, 400)
        large = small.resize((1600, 1600), Image.Resampling.BICUBIC)
        changes = [
            difference(at_size_of_encoder(distort(picture, kind, 4, 1)), at_size_of_encoder(picture))
            for picture in (small, large)
        ]
        # 0.6: the two pictures differ in their finest details, which blur and JPEG change most
        assert 0.6 < changes[1] / changes[0] < 1 / 0.6, changes


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no distortion 'fog' of strength 1: blur, noise"):
        distort(scene(), "fog", 1, 0)
    for strength in (0, 6):
        with pytest.raises(ValueError, match=f"of strength {strength}: .*; 1 to 5"):
            distort(scene(), "blur", strength, 0)
    with pytest.raises(ValueError, match="the picture is L, not RGB: pass it through load_image first"):
        distort(scene().convert("L"), "blur", 1, 0)


class TestWhatEachKindDoes:
    def test_noise_has_its_standard_deviation(self):
        gray = Image.new("RGB", (384, 384), (128, 128, 128))
        for strength, expected in zip(STRENGTHS, visual.augment.NOISE_LEVELS, strict=True):
            changes = levels(distort(gray, "noise", strength, 0)) - 128
            assert abs(changes.mean()) < 0.5  # 5 standard errors of 442,368 values at strength 5
            cut = np.random.default_rng(0).normal(0, expected, 10**6).clip(-128, 127)  # levels end at 0 and 255
            # 0.5 %: 5 standard errors, of a share of 1 / sqrt(2 × 442,368)
            assert changes.std() == pytest.approx(cut.std(), rel=0.005)

    def test_noise_of_a_large_photo_averages_to_that_of_a_small_one(self):
        small, large = (Image.new("RGB", (edge, edge), (128, 128, 128)) for edge in (384, 1536))
        reduced = distort(large, "noise", 3, 0).resize((384, 384), Image.Resampling.BOX)
        assert reduced.tobytes() == distort(small, "noise", 3, 0).tobytes()

    def test_occlusion_covers_its_share_at_most(self):
        picture = scene(300, 200)
        mean = [round(value) for value in ImageStat.Stat(picture).mean]
        for strength, share in zip(STRENGTHS, visual.augment.OCCLUDED_SHARE, strict=True):
            shares = []
            for seed in range(20):
                distorted = distort(picture, "occlusion", strength, seed)
                changed = (levels(distorted) != levels(picture)).any(axis=-1)
                shares.append(changed.mean())
                assert (levels(distorted)[changed] == mean).all()
            assert max(shares) < share + 0.01  # edges are rounded to whole pixels
            assert np.mean(shares) > share / 2  # rectangles may overlap

    def test_jpeg_is_that_of_the_encoder_at_its_size(self):
        picture = scene(384, 300)
        for strength, quality in zip(STRENGTHS, visual.augment.JPEG_QUALITY, strict=True):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
            # one byte holds a change of -128 to 127; larger ones are at single pixels beside sharp edges
            change = (levels(Image.open(file)) - levels(picture)).clip(-128, 127)
            assert np.array_equal(levels(distort(picture, "jpeg", strength, 0)), levels(picture) + change)
            assert np.mean(abs(change) > 126) < 1e-3

    def test_light_equals_pillows_enhancement(self):
        picture, seen = scene(), set()
        for seed in range(12):
            distorted = distort(picture, "light", 4, seed)
            candidates = {
                (brightness, contrast): ImageEnhance.Contrast(
                    ImageEnhance.Brightness(picture).enhance(brightness)
                ).enhance(contrast)
                for brightness in (1 / 1.75, 1.75)
                for contrast in (0.6, 1.4)
            }
            nearest = min(candidates, key=lambda key: difference(candidates[key], distorted))
            seen.add(nearest)
            # Pillow rounds down after each of the two, and rounds the mean: 1.4 × 1 + 0.4 × 1 + 1 levels
            assert np.abs(levels(candidates[nearest]) - levels(distorted)).max() <= 3
        assert len(seen) == 4, "darker and brighter, with more and with less contrast"

    def test_rotation_fills_corners_with_the_mean_colour(self):
        picture = scene()
        mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
        for seed in range(6):
            distorted = distort(picture, "rotation", 5, seed)
            corners = [distorted.getpixel(place) for place in ((0, 0), (319, 0), (0, 239), (319, 239))]
            assert corners == [mean] * 4

    def test_rotation_turns_both_ways_within_its_angles(self):
        size, angles = 401, []
        picture = Image.new("RGB", (size, size))
        ImageDraw.Draw(picture).rectangle((0, 198, 400, 202), fill="white")  # a level line through the middle
        for seed in range(20):
            turned = levels(distort(picture, "rotation", 5, seed))[..., 0]
            rows = [np.average(np.arange(size), weights=turned[:, column] > 128) for column in (100, 300)]
            angles.append(np.degrees(np.arctan2(rows[0] - rows[1], 200)))
        assert min(np.abs(angles)) > 7.2  # 7.5 to 15, within half a pixel of the line's 200
        assert max(np.abs(angles)) < 15.3
        assert min(angles) < 0 < max(angles)

    @pytest.mark.parametrize("kind", ["noise", "jpeg"])
    def test_details_of_a_large_photo_stay(self, kind):
        """Encoders that read several crops of a photo see its own pixels, not an enlarged copy."""
        stripes = np.full((900, 1200, 3), 100, np.uint8)
        stripes[:, ::2] += 60  # one pixel wide: an enlarged copy of a picture 384 px wide would have lost them
        distorted = levels(distort(Image.fromarray(stripes), kind, 3, 0))
        # 50 of 60: JPEG also changes the moire that the stripes leave in the reduced picture
        assert distorted[:, ::2].mean() - distorted[:, 1::2].mean() > 50


class TestAugment:
    def test_half_of_the_photos_stay(self):
        augment, picture = Augment(KINDS), scene(48, 32)
        untouched = sum(augment(picture, f"0 0 {index}") is picture for index in range(400))
        assert 160 <= untouched <= 240  # 4 standard deviations of 400 fair coins are 40

    def test_same_text_same_pixels_another_epoch_others(self):
        augment, picture = Augment(KINDS), scene(48, 32)
        before = picture.tobytes()
        epochs = [[augment(picture, f"0 {epoch} {index}").tobytes() for index in range(40)] for epoch in (0, 0, 1)]
        assert epochs[0] == epochs[1]
        # both epochs leave a quarter of the photos alone, and the two kinds without draws can meet
        assert sum(first != other for first, other in zip(epochs[0], epochs[2], strict=True)) > 20
        assert picture.tobytes() == before

    def test_every_kind_at_weak_and_middle_strengths(self, monkeypatch):
        drawn = recorded(monkeypatch)
        augment = Augment(["noise", "light"])
        for index in range(400):
            augment(scene(4, 4), str(index))
        for kind in ("noise", "light"):
            for strength in (1, 2, 3):
                assert 13 <= drawn.count((kind, strength)) <= 54  # 33 of 400, ± 3.7 standard deviations
        assert set(drawn) == {(kind, strength) for kind in ("noise", "light") for strength in (1, 2, 3)}

    def test_order_of_kinds_has_no_effect(self):
        picture = scene(48, 32)
        for index in range(20):
            assert Augment(KINDS)(picture, str(index)) == Augment(KINDS[::-1])(picture, str(index))

    def test_draws_are_the_same_on_every_platform_and_in_every_release(self, monkeypatch):
        drawn = recorded(monkeypatch)
        for index in range(10):
            Augment(KINDS)(scene(4, 4), f"0 1 {index}")
        # five of the ten are left as they are
        assert drawn == [("jpeg", 2), ("noise", 1), ("occlusion", 3), ("light", 1), ("rotation", 3)]

    def test_worker_process_draws_the_same(self):
        """In a process of its own, where Python's hash of a text is another one."""
        augment = Augment(KINDS)
        code = (
            "import pickle, sys; augment, picture = pickle.load(sys.stdin.buffer);"
            "pickle.dump([augment(picture, str(index)).tobytes() for index in range(20)], sys.stdout.buffer)"
        )
        picture = scene(48, 32)
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps((augment, picture)),
            capture_output=True,
            check=True,
            cwd=REPO_ROOT,
        )
        assert pickle.loads(done.stdout) == [augment(picture, str(index)).tobytes() for index in range(20)]

    @pytest.mark.parametrize("kinds", [[], ["fog"], ["blur", "fog"]])
    def test_wrong_kinds(self, kinds):
        with pytest.raises(ValueError, match="give one or more of blur, noise"):
            Augment(kinds)


def recorded(monkeypatch):
    """The list of (kind, strength) that is drawn from now on."""
    drawn = []
    for kind in KINDS:
        monkeypatch.setitem(
            DISTORTIONS, kind, lambda image, strength, rng, kind=kind: drawn.append((kind, strength)) or image
        )
    return drawn


class TestConfig:
    def test_kinds_are_those_that_there_are(self):
        (kind,) = get_args(Data.model_fields["augment"].annotation)
        assert list(get_args(kind)) == KINDS

    def test_off_unless_asked_for(self):
        assert load_config("config.yaml").data.augment == Data().augment == []
        assert load_config("config.yaml", ["data.augment=[blur, light]"]).data.augment == ["blur", "light"]

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (["data.augment=[blur, jpeg, blur]"], "'data.augment' = ['blur', 'jpeg', 'blur']: a kind is named twice"),
            (["data.augment=[blurr]"], "'data.augment.0' = 'blurr': Input should be 'blur', 'noise'"),
            (
                ["data.augment=[blur]", "data.cache_features=true"],
                "'data': with 'cache_features' each photo is encoded once, so 'augment' could not change it: "
                "set cache_features: false or augment: []",
            ),
        ],
    )
    def test_mistakes_are_one_sentence(self, overrides, expected):
        with pytest.raises(UserError) as caught:
            load_config("config.yaml", overrides)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
