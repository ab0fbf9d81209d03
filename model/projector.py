"""Projectors: encoder features of a crop → tokens of the language model.

`build_projector` builds the kind named by `projector.kind`. A new kind is a subclass of `FeatureProjector` and a line
in `PROJECTORS`; no other code uses a projector's layers.

Shapes: C crops, R rows of a crop (`grid.rows`), M tokens of a crop, Dv width of the encoder, Dl of the language model.
"""

import difflib
from collections.abc import Iterable

import torch
from torch import nn

from config import Projector
from errors import UserError, shortened
from visual_plan import Grid


class FeatureProjector(nn.Module):
    """Base class of all projectors; each has at least one parameter.

    Args:
        settings: section `projector` of the config.
        grid: the rows of a crop.
        width, out_width: Dv and Dl.
    """

    def __init__(self, settings: Projector, grid: Grid, width: int, out_width: int) -> None:
        super().__init__()
        self.kind = settings.kind

    def tokens(self, grid: Grid) -> int:
        """M, the number of tokens of a crop with this grid."""
        raise NotImplementedError

    def forward(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """`(C, R, Dv)` encoder features of any dtype → `(C, M, Dl)` tokens."""
        raise NotImplementedError

    def places(self, grid: Grid) -> torch.Tensor:
        """Return the token that shows each patch, (height, width) int64; -1: none does.

        Raises:
            UserError: each token may show the whole crop.
        """
        raise UserError(
            f"'projector.kind' is {self.kind}, whose tokens have no place in the photo, so there is no heatmap: use a "
            "checkpoint that was trained with projector.kind=mlp or pixel_shuffle"
        )

    def operations(self, grid: Grid, trained: bool, passes_on: bool = False) -> int:
        """Floating-point operations of one crop in a training step.

        Counted as `training/costs.py` does: a matrix with P weights costs 2·P for each position in the forward pass,
        2·P more for its own gradient, and 2·P for the gradient of its input if that is needed. If neither projector nor
        encoder is trained, only the forward pass is counted.

        Args:
            trained: its weights get gradients.
            passes_on: its input rows get gradients, because the encoder is trained.
        """
        raise NotImplementedError

    def llava_tensors(self) -> dict[str, torch.Tensor]:
        """Return its weights under the names of the projector in transformers' LLaVA classes.

        Raises:
            UserError: those classes have no such projector.
        """
        raise UserError(
            f"'projector.kind' is {self.kind}, and no stock LLaVA class holds such a projector: use --format onnx or "
            "openvino, or export a checkpoint that was trained with projector.kind=mlp"
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def cast(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return `rows` in the projector's dtype; ValueError if their number is not that of `grid`."""
        if rows.shape[1] != grid.rows:
            raise ValueError(f"{rows.shape[1]} rows of a crop, but {grid} has {grid.rows}")
        return rows.to(self.dtype)


class Mlp(FeatureProjector, nn.Sequential):
    """Linear(Dv, Dl), GELU, Linear(Dl, Dl) on each row: LLaVA-1.5's (Liu et al. 2023, arXiv 2310.03744). M = R.

    A sequence, because its tensors are named "0.weight", "0.bias", "2.weight" and "2.bias" in the report's checkpoints.
    """

    def __init__(self, settings: Projector, grid: Grid, width: int, out_width: int) -> None:
        super().__init__(settings, grid, width, out_width)
        self.extend(_two_layers(width, out_width))
        _initialise(self.modules(), settings.init_std)

    def tokens(self, grid: Grid) -> int:
        return grid.rows

    def forward(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return nn.Sequential.forward(self, self.cast(rows, grid))

    def places(self, grid: Grid) -> torch.Tensor:
        tokens = torch.arange(grid.height * grid.width) + grid.extra  # below 0: dropped
        return tokens.clamp_min(-1).view(grid.height, grid.width)

    def operations(self, grid: Grid, trained: bool, passes_on: bool = False) -> int:
        first, second = self[0].weight.numel(), self[2].weight.numel()
        own, inner = 2 + 2 * trained, 2 * (trained or passes_on)
        return self.tokens(grid) * ((own + 2 * passes_on) * first + (own + inner) * second)

    def llava_tensors(self) -> dict[str, torch.Tensor]:
        layers = {"linear_1": self[0], "linear_2": self[2]}
        return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()}


class PixelShuffle(Mlp):
    """`Mlp` on squares of `projector.factor`² patches, each joined to one row: fewer, wider rows.

    InternVL 1.5 (arXiv 2404.16821, factor 2) and SmolVLM (arXiv 2504.05299, also larger factors) use the same
    space-to-depth step. 27 × 27 patches become 9 × 9 = 81 tokens at factor 3.

    Tokens are in row order, like the patches. With f the factor, token (i, j) joins the patches (f·i + y, f·j + x) in
    the order of y, then x: columns Dv·(f·y + x) to Dv·(f·y + x + 1) of its row.

    Of the mean of the crop's rows, only `projector.mean_share` stays in each, by default 1 / factor: the squares of
    what all patches have in common then add up to one patch's. With all of it, a row holds factor² times what is common
    and once what one patch shows, and training does not get past guessing for a long time. With none, a row does not
    know what the photo is about, which the mean of a ViT's patches says.

    Zeros, the mean patch, replace a dropped first patch to complete the grid. If the factor does not divide a side,
    zeros fill the last squares at the bottom and on the right: 14 × 14 patches become 5 × 5 tokens at factor 3.

    Raises:
        UserError: the encoder has rows in front of the patches; they belong to no square.
    """

    def __init__(self, settings: Projector, grid: Grid, width: int, out_width: int) -> None:
        super().__init__(settings, grid, width * settings.factor**2, out_width)
        self.factor = settings.factor
        self.mean_share = 1 / settings.factor if settings.mean_share is None else settings.mean_share
        self.tokens(grid)  # raises for an unsupported grid, before training starts

    def tokens(self, grid: Grid) -> int:
        if grid.extra > 0:
            raise UserError(
                f"'projector.kind' {self.kind} takes patches only, and the encoder puts {grid.extra} more in front of "
                "them: set visual.drop=leading"
            )
        return -(-grid.height // self.factor) * -(-grid.width // self.factor)

    def forward(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return nn.Sequential.forward(self, self.squares(self.cast(rows, grid), grid))

    def squares(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        """`(C, R, Dv)` → `(C, M, factor² · Dv)`."""
        rows = rows - (1 - self.mean_share) * rows.mean(1, keepdim=True)
        patches = nn.functional.pad(rows, (0, 0, max(-grid.extra, 0), 0))
        patches = patches.unflatten(1, (grid.height, grid.width))  # (C, height, width, Dv)
        patches = nn.functional.pad(patches, (0, 0, 0, -grid.width % self.factor, 0, -grid.height % self.factor))
        patches = patches.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor))  # (C, i, y, j, x, Dv)
        return patches.transpose(2, 3).flatten(3).flatten(1, 2)

    def places(self, grid: Grid) -> torch.Tensor:
        rows = torch.arange(grid.height)[:, None] // self.factor
        columns = torch.arange(grid.width) // self.factor
        tokens = rows * -(-grid.width // self.factor) + columns
        tokens.view(-1)[: max(-grid.extra, 0)] = -1
        return tokens

    llava_tensors = FeatureProjector.llava_tensors


class Resampler(FeatureProjector):
    """`projector.queries` learned vectors that attend to all rows of a crop; M = queries for any grid.

    The idea is from Flamingo (arXiv 2204.14198, perceiver resampler, 64 queries) and BLIP-2's Q-Former (arXiv
    2301.12597, 32 queries). The single layer of cross-attention with fixed sine positions on the keys is from Qwen-VL
    (arXiv 2308.12966, 256 queries). Two layers as in `Mlp` follow and also mix the heads.

        keys = key(norm(rows) + positions), values = value(norm(rows))
        tokens = mlp(norm(queries + attention(norm(queries), keys, values)))

    Rows in front of the patches have their own positions; a dropped first patch is absent.

    Raises:
        UserError: `projector.heads` does not divide Dl.
    """

    def __init__(self, settings: Projector, grid: Grid, width: int, out_width: int) -> None:
        super().__init__(settings, grid, width, out_width)
        self.heads = settings.heads
        if out_width % self.heads:
            divisor = max(number for number in range(1, self.heads) if out_width % number == 0)
            raise UserError(
                f"'projector.heads' is {self.heads}, which does not divide the language model's width {out_width}: "
                f"set it to {divisor}, for example"
            )
        self.queries = nn.Parameter(torch.empty(settings.queries, out_width))
        self.query_norm = nn.LayerNorm(out_width)
        # no key bias: it would add the same value to all scores of a query and cancel in the softmax
        self.key = nn.Linear(width, out_width, bias=False)
        self.value = nn.Linear(width, out_width)
        self.token_norm = nn.LayerNorm(out_width)
        self.mlp = nn.Sequential(*_two_layers(out_width, out_width))
        nn.init.normal_(self.queries, mean=0.0, std=settings.init_std)
        _initialise(self.modules(), settings.init_std)

    def tokens(self, grid: Grid) -> int:
        return len(self.queries)

    def forward(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        rows = self.cast(rows, grid)
        # no norm weights: key and value can represent them, and no gradient has to pass through key and value
        rows = nn.functional.layer_norm(rows, rows.shape[-1:])
        keys = self.key(rows + sine_positions(grid, rows.shape[-1], rows.device).to(rows.dtype))  # (C, R, Dl)
        queries = self.query_norm(self.queries).expand(len(rows), -1, -1)  # (C, M, Dl)
        heads = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, self.value(rows))]
        attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # (C, M, Dl)
        return self.mlp(self.token_norm(self.queries + attended))

    def operations(self, grid: Grid, trained: bool, passes_on: bool = False) -> int:
        rows = self.key.weight.numel() + self.value.weight.numel()
        tokens = self.mlp[0].weight.numel() + self.mlp[2].weight.numel()
        # scores and weighted values: two products of M · Dl numbers per row, and both factors need gradients
        own, inner = 2 + 2 * trained, 2 * (trained or passes_on)
        attention = (own + inner + 2 + 2 * inner) * self.queries.numel()
        return grid.rows * ((own + 2 * passes_on) * rows + attention) + self.tokens(grid) * (own + inner) * tokens


def sine_positions(grid: Grid, width: int, device: torch.device) -> torch.Tensor:
    """Return (R, width) float32 sine and cosine encodings of the two coordinates of each row of a crop.

    A quarter of the columns each: sine and cosine of the vertical, then of the horizontal coordinate in patches, at
    wavelengths from 2π to 10,000 · 2π (Vaswani et al. 2017, arXiv 1706.03762). Remaining columns are 0. Rows in front
    of the patches have coordinates side by side in a separate line above the grid.
    """
    vertical = torch.arange(grid.height, device=device).repeat_interleave(grid.width)
    horizontal = torch.arange(grid.width, device=device).repeat(grid.height)
    leading = torch.arange(max(grid.extra, 0), device=device)
    dropped = max(-grid.extra, 0)
    vertical = torch.cat([torch.full_like(leading, -1), vertical[dropped:]])
    horizontal = torch.cat([leading, horizontal[dropped:]])
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, device=device) / quarter)
    angles = [coordinate[:, None] * frequencies for coordinate in (vertical, horizontal)]
    columns = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return nn.functional.pad(torch.cat(columns, dim=1), (0, width - 4 * quarter))


def _two_layers(width: int, out_width: int) -> list[nn.Module]:
    return [nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width)]


def _initialise(modules: Iterable[nn.Module], std: float) -> None:
    for layer in modules:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, mean=0.0, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


PROJECTORS: dict[str, type[FeatureProjector]] = {"mlp": Mlp, "pixel_shuffle": PixelShuffle, "resampler": Resampler}


def build_projector(settings: Projector, grid: Grid, width: int, out_width: int) -> FeatureProjector:
    """Build the projector named by `projector.kind`, initialised from torch's global generator.

    Args:
        settings: section `projector` of the config.
        grid: the rows of a crop, without dropped rows (`visual.drop`).
        width, out_width: Dv and Dl.

    Raises:
        UserError: unknown kind, or the settings do not fit grid and widths.
    """
    if settings.kind not in PROJECTORS:
        near = difflib.get_close_matches(settings.kind, PROJECTORS, n=1, cutoff=0.5)
        hint = f", did you mean '{near[0]}'?" if near else ":"
        raise UserError(
            f"unknown 'projector.kind' '{shortened(settings.kind)}'{hint} valid are {', '.join(sorted(PROJECTORS))}"
        )
    return PROJECTORS[settings.kind](settings, grid, width, out_width)
