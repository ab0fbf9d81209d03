"""Feature rows, crops and placeholders of one photo.

`visual/` gives the rows of a crop (`Grid`), the projector gives the tokens of these rows, and `qwen/chat.py` writes
that many placeholders. None of the three imports another.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Grid(NamedTuple):
    """Feature rows of one crop.

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
        tile_rows, tile_columns: tile grid of the photo; 0 and 0: no tiles.
    """

    crop_tokens: int
    tile_rows: int = 0
    tile_columns: int = 0

    @property
    def crops(self) -> int:
        """Number of crops."""
        return 1 + self.tile_rows * self.tile_columns

    @property
    def tokens(self) -> int:
        """Number of placeholders."""
        return self.crops * self.crop_tokens
