"""What one photo becomes on its way to the language model: rows of features, and placeholders among the text.

`visual/` says how many rows a crop has (`Grid`), the projector how many tokens it makes of them, and `qwen/chat.py`
writes that many placeholders; none of the three imports another.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Grid(NamedTuple):
    """The rows that an encoder gives for one crop.

    Attributes:
        height, width: patches.
        extra: rows in front of the patches (class token, registers); -1: the first patch is left out.
    """

    height: int
    width: int
    extra: int = 0

    @property
    def rows(self) -> int:
        """Number of rows of one crop."""
        return self.height * self.width + self.extra


@dataclass(frozen=True)
class VisualPlan:
    """The crops of one photo and their placeholders: the whole photo first, then its tiles row by row.

    Attributes:
        crop_tokens: placeholders of one crop.
        tile_rows, tile_columns: how the photo is cut into tiles; 0 and 0: it is not.
    """

    crop_tokens: int
    tile_rows: int = 0
    tile_columns: int = 0

    @property
    def crops(self) -> int:
        """Number of pictures that the encoder sees."""
        return 1 + self.tile_rows * self.tile_columns

    @property
    def tokens(self) -> int:
        """Number of placeholders."""
        return self.crops * self.crop_tokens
