"""Distorted copies of photos: random in training (`data.augment`), of one kind and strength in an evaluation.

Each kind has five strengths, as in Hendrycks & Dietterich 2019 (arXiv 1903.12261). The values are our own: theirs are
for classification of 224 px photos, and their strongest ones remove the details that questions ask about.
Lengths scale with the photo, because an encoder resizes every photo to a few hundred pixels. Noise of single pixels or
a blur of 3 px would vanish from a photo of 12 megapixels.
"""

import hashlib
import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageStat

STRENGTHS = (1, 2, 3, 4, 5)
TRAINING_STRENGTHS = (1, 2, 3)  # at these a person can still answer questions about the photo, so its labels are valid
UNTOUCHED = 0.5  # share of unchanged photos: most photos in later use are undistorted

# Longest edge in px for noise and JPEG. Encoders get 224 to 384 px (so400m), so finer grain would vanish.
SEEN_PX = 384

# Tables: one value per strength, chosen by eye on 384 px photos and drawn scenes.
# Standard deviation of the blur, in px of a photo whose short edge has SEEN_PX; at this size theirs go from 1.7 to 10.
BLUR_PX = (1.0, 2.0, 3.0, 4.5, 6.0)
# Standard deviation of the noise, in levels of 255; theirs go from 20 to 97.
NOISE_LEVELS = (10, 18, 28, 42, 60)
# Share of the photo under rectangles; less if they overlap. Random erasing (arXiv 1708.04896) hides 0.02 to 0.4.
OCCLUDED_SHARE = (0.04, 0.08, 0.13, 0.20, 0.30)
OCCLUDERS = 3  # rectangles: a single one of the same area would more often hide a whole object and the answer
# Pillow's quality. Below 30 the blocks of 8 px become visible; theirs go from 25 to 7.
JPEG_QUALITY = (30, 20, 13, 9, 6)
# Brightness is multiplied or divided by this. A factor of 2 is one stop of a camera's exposure.
BRIGHTNESS_FACTOR = (1.15, 1.3, 1.5, 1.75, 2.0)
# Contrast is multiplied by 1 plus or minus this.
CONTRAST_CHANGE = (0.1, 0.2, 0.3, 0.4, 0.5)
LUMA = np.array([0.299, 0.587, 0.114])  # weights of R, G, B in a gray picture (ITU-R BT.601), as Pillow's
# Largest angle in degrees. Hand-held photos are tilted by a few degrees; beyond 15 answers like "left of" may change.
ROTATION_DEGREES = (3, 6, 9, 12, 15)


def _blur(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR_PX[strength - 1] * min(image.size) / SEEN_PX))


def _noise(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    width, height = _seen_size(image)
    return _add(image, rng.standard_normal((height, width, 3), dtype=np.float32) * NOISE_LEVELS[strength - 1])


def _occlusion(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    """Cover the photo with rectangles of its mean colour, which add no new object."""
    occluded, colour = image.copy(), _mean_colour(image)
    for _ in range(OCCLUDERS):
        area = OCCLUDED_SHARE[strength - 1] / OCCLUDERS
        aspect = 2 ** rng.uniform(-1, 1)  # 1:2 to 2:1 in a square photo
        width = max(1, round(image.width * (area * aspect) ** 0.5))
        height = max(1, round(image.height * (area / aspect) ** 0.5))
        left = round(rng.random() * (image.width - width))
        top = round(rng.random() * (image.height - height))
        occluded.paste(colour, (left, top, left + width, top + height))
    return occluded


def _jpeg(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    """Add the error of JPEG compression at the encoder's size to the photo."""
    small = image.resize(_seen_size(image), Image.Resampling.BOX)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=JPEG_QUALITY[strength - 1], subsampling="4:2:0")
    with Image.open(file, formats=["JPEG"]) as compressed:
        return _add(image, np.asarray(compressed, dtype=np.float32) - np.asarray(small, dtype=np.float32))


def _light(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    """Change brightness and contrast with a table of levels, which needs only one copy of the photo."""
    brightness = BRIGHTNESS_FACTOR[strength - 1] ** rng.choice((-1, 1))
    contrast = 1 + CONTRAST_CHANGE[strength - 1] * rng.choice((-1, 1))
    levels = (np.arange(256) * brightness).clip(0, 255)
    # of the brightened photo: with the mean of the original, more contrast would turn its dark parts black
    mean = LUMA @ (np.reshape(image.histogram(), (3, 256)) @ levels) / (image.width * image.height)
    table = (levels - mean) * contrast + mean
    return image.point(table.round().clip(0, 255).astype(int).tolist() * 3)


def _rotation(image: Image.Image, strength: int, rng: np.random.Generator) -> Image.Image:
    """Rotate by at least half of the largest angle, so that strengths differ; corners get the mean colour."""
    angle = ROTATION_DEGREES[strength - 1] * rng.uniform(0.5, 1) * rng.choice((-1, 1))
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=_mean_colour(image))


# Kind → (RGB picture, strength 1..5, generator) → a new RGB picture of the same size. Same names: `Data.augment`.
DISTORTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "occlusion": _occlusion,
    "jpeg": _jpeg,
    "light": _light,
    "rotation": _rotation,
}


def distort(image: Image.Image, kind: str, strength: int, seed: int | str) -> Image.Image:
    """Return a distorted copy of an RGB photo with the same size and mode; equal arguments give equal copies.

    Args:
        kind: one of `DISTORTIONS`.
        strength: 1 (weak) to 5 (strong).
        seed: of place, direction and grain; use a different one for each photo, for example f"{seed} {photo ID}".

    Raises:
        ValueError: unknown kind or strength, or a picture that is not RGB.
    """
    if kind not in DISTORTIONS or strength not in STRENGTHS:
        raise ValueError(
            f"no distortion {kind!r} of strength {strength}: {', '.join(DISTORTIONS)}; 1 to {STRENGTHS[-1]}"
        )
    if image.mode != "RGB":
        raise ValueError(f"the picture is {image.mode}, not RGB: pass it through load_image first")
    return DISTORTIONS[kind](image, strength, _generator(seed))


class Augment:
    """RGB picture → the same picture, or with probability 1/2 a distorted copy of strength 1 to 3.

    A class instead of a closure, because worker processes can receive it. The drawn photos, kinds, strengths and places
    are the same on every platform; JPEG pixels may differ by one level between builds of Pillow.

    Args:
        kinds: of `DISTORTIONS`, at least one; their order has no effect.

    Raises:
        ValueError: no kind, or an unknown one.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self.kinds = sorted(kinds)
        if not self.kinds or not set(self.kinds) <= DISTORTIONS.keys():
            raise ValueError(f"kinds {self.kinds}: give one or more of {', '.join(DISTORTIONS)}")

    def __call__(self, image: Image.Image, seed_text: str) -> Image.Image:
        """Return the photo for training.

        Args:
            seed_text: determines all random draws in any process; include everything that should change them, for
                example f"{seed} {epoch} {photo ID}".
        """
        rng = _generator(seed_text)
        if rng.random() < UNTOUCHED:
            return image
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        return DISTORTIONS[kind](image, int(rng.choice(TRAINING_STRENGTHS)), rng)


def _generator(seed: int | str) -> np.random.Generator:
    # not hash(): Python salts text hashes differently in each process
    return np.random.default_rng(int.from_bytes(hashlib.sha256(str(seed).encode()).digest(), "big"))


def _seen_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height), each at most `SEEN_PX`; SigLIP's processor also resizes both edges independently."""
    return min(image.width, SEEN_PX), min(image.height, SEEN_PX)


def _add(image: Image.Image, change: np.ndarray) -> Image.Image:
    """Add `change` (h, w, 3), in levels, enlarged to the size of the photo; levels are clipped to 0 to 255.

    The photo keeps its resolution, so several crops of it contain all its details.
    """
    shifted = Image.fromarray((change.round() + 128).clip(0, 255).astype(np.uint8))
    # Each value becomes a rectangle of equal pixels; the encoder's resize averages it back to that value.
    # Interpolation would weaken noise.
    return ImageChops.add(image, shifted.resize(image.size, Image.Resampling.NEAREST), offset=-128)


def _mean_colour(image: Image.Image) -> tuple[int, ...]:
    return tuple(round(mean) for mean in ImageStat.Stat(image).mean)
