"""Projectors beside the definition written out, their cost beside the products that run, mistakes in the settings."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Projector, load_config
from errors import UserError
from model.model import MMultiModal
from model.projector import PROJECTORS, FeatureProjector, build_projector, sine_positions
from paths import REPO_ROOT
from tests.tiny import tiny_config
from visual_plan import Grid

WIDTH, OUT_WIDTH = 12, 32
KINDS = ["mlp", "pixel_shuffle", "resampler"]
WHOLE, DROPPED, LEADING = Grid(6, 9), Grid(6, 9, -1), Grid(6, 9, 2)


def build(kind, grid=DROPPED, seed=0, **settings):
    torch.manual_seed(seed)
    return build_projector(Projector(kind=kind, **settings), grid, WIDTH, OUT_WIDTH)


def random_rows(grid, crops=2, seed=1, dtype=torch.float32):
    return torch.randn(crops, grid.rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("kind", "grid"), [*itertools.product(KINDS, [WHOLE, DROPPED]), ("mlp", LEADING), ("resampler", LEADING)]
)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_shape_and_dtype(kind, grid, given, own):
    projector = build(kind, grid).to(own)
    assert (projector.dtype, projector.device) == (own, torch.device("cpu"))
    tokens = projector(random_rows(grid, dtype=given), grid)
    assert tokens.shape == (2, projector.tokens(grid), OUT_WIDTH)
    assert tokens.dtype == own
    assert projector.tokens(grid) == {"mlp": grid.rows, "pixel_shuffle": 2 * 3, "resampler": 64}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_grid_are_refused(kind):
    with pytest.raises(ValueError, match="54 rows of a crop, but .* has 53"):
        build(kind)(random_rows(WHOLE), DROPPED)


@pytest.mark.parametrize("kind", KINDS)
def test_crops_do_not_see_each_other(kind):
    projector, rows = build(kind, init_std=0.2).double(), random_rows(DROPPED, crops=3).double()
    alone = torch.cat([projector(crop, DROPPED) for crop in rows.split(1)])
    # float64; matrix products of other sizes may add in another order
    assert torch.allclose(projector(rows, DROPPED), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_under_autocast(kind):
    projector, rows = build(kind, init_std=0.1), random_rows(DROPPED)
    exact = projector(rows, DROPPED)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = projector(rows.bfloat16(), DROPPED)
    tokens.float().square().sum().backward()
    # bf16 has 8 significant bits: half a per cent for each of at most four products in a row
    assert (tokens - exact).norm() < 0.02 * exact.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crops", [1, 3])
def test_gradients_reach_every_parameter(kind, crops):
    projector = build(kind, init_std=0.1)
    tokens = projector(random_rows(DROPPED, crops), DROPPED)
    (tokens * torch.randn_like(tokens)).sum().backward()
    silent = [name for name, p in projector.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("std", [0.01, 0.2])
def test_initial_weights(kind, std):
    for name, parameter in build(kind, init_std=std, seed=3).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name)))
        else:  # hundreds of numbers: their deviation and mean are within a few per cent of the drawn one
            assert parameter.std().item() == pytest.approx(std, rel=0.3)
            assert abs(parameter.mean().item()) < 0.3 * std


@pytest.mark.parametrize("grid", [WHOLE, DROPPED, LEADING])
def test_mlp_is_the_sequence_that_older_versions_built(grid):
    projector = build("mlp", grid, seed=7)
    torch.manual_seed(7)
    before = nn.Sequential(nn.Linear(WIDTH, OUT_WIDTH), nn.GELU(), nn.Linear(OUT_WIDTH, OUT_WIDTH))
    for layer in (before[0], before[2]):
        nn.init.normal_(layer.weight, mean=0.0, std=0.01)
        nn.init.zeros_(layer.bias)
    next_number = torch.rand(1)
    assert list(projector.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in projector.state_dict().items())
    build("mlp", grid, seed=7)
    assert torch.equal(torch.rand(1), next_number)  # what is drawn afterwards stays the same too
    rows = random_rows(grid)
    assert torch.equal(projector(rows, grid), before(rows))
    projector.load_state_dict(before.state_dict())


def test_names_in_stock_classes():
    projector = build("mlp")
    stock = projector.llava_tensors()
    assert list(stock) == ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    for new, old in zip(stock, projector.state_dict(), strict=True):
        assert torch.equal(stock[new], projector.state_dict()[old])


@pytest.mark.parametrize("kind", ["pixel_shuffle", "resampler"])
def test_kinds_without_a_stock_class(kind):
    sentence = f"'projector.kind' is {kind}, and no stock .* --format onnx or openvino.* projector.kind=mlp"
    with pytest.raises(UserError, match=sentence):
        build(kind).llava_tensors()


def squares_one_by_one(rows, grid, factor, share):
    """The rule of `PixelShuffle`, patch by patch."""
    height, width = math.ceil(grid.height / factor), math.ceil(grid.width / factor)
    wide = torch.zeros(len(rows), height * width, factor**2 * WIDTH, dtype=rows.dtype)
    rows = rows - (1 - share) * sum(rows[:, row : row + 1] for row in range(grid.rows)) / max(grid.rows, 1)
    for crop, row, column in itertools.product(range(len(rows)), range(grid.height), range(grid.width)):
        index = row * grid.width + column + grid.extra
        if index < 0:
            continue  # left out by `visual`: zeros
        token = row // factor * width + column // factor
        start = (row % factor * factor + column % factor) * WIDTH
        wide[crop, token, start : start + WIDTH] = rows[crop, index]
    return wide


@pytest.mark.parametrize("extra", [0, -1])
@pytest.mark.parametrize(("factor", "share"), [(2, None), (3, None), (3, 0.0), (2, 1.0)])
@pytest.mark.parametrize("sides", [(6, 6), (6, 12), (7, 9), (8, 5), (1, 1)])
def test_pixel_shuffle_equals_patch_by_patch(sides, factor, share, extra):
    grid = Grid(*sides, extra)
    projector = build("pixel_shuffle", grid, factor=factor, mean_share=share, init_std=0.1).double()
    rows = random_rows(grid).double()
    wide = squares_one_by_one(rows, grid, factor, 1 / factor if share is None else share)
    assert torch.allclose(projector.squares(rows, grid), wide, rtol=0, atol=1e-13)  # float64, sums in another order
    hidden = wide @ projector[0].weight.T + projector[0].bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU by its definition
    expected = hidden @ projector[2].weight.T + projector[2].bias
    assert projector.tokens(grid) == expected.shape[1]
    # float64: what is left is the rounding of sums of a hundred products
    assert torch.allclose(projector(rows, grid), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("grid", "factor", "tokens"),
    [(Grid(27, 27, -1), 3, 81), (Grid(27, 27), 3, 81), (Grid(14, 14), 3, 25), (Grid(24, 24), 2, 144)],
)
def test_tokens_of_known_encoders(grid, factor, tokens):
    assert build("pixel_shuffle", grid, factor=factor).tokens(grid) == tokens


@pytest.mark.parametrize(("kind", "grid"), [*itertools.product(KINDS[:2], [WHOLE, DROPPED]), ("mlp", LEADING)])
def test_the_place_of_a_token_is_that_of_the_patches_it_changes_with(kind, grid):
    projector = build(kind, grid, init_std=0.1)
    rows, places = random_rows(grid, crops=1), projector.places(grid)
    assert places.shape == (grid.height, grid.width)
    first = -min(grid.extra, 0)
    assert (places.flatten()[:first] == -1).all()
    for patch in range(first, places.numel()):
        changed = rows.clone()
        changed[0, patch + grid.extra] += 5
        moved = (projector(changed, grid) - projector(rows, grid)).norm(dim=-1)[0]
        assert places.flatten()[patch] == moved.argmax()  # the mean that pixel_shuffle subtracts moves all a little


def test_pixel_shuffle_refuses_rows_before_the_patches():
    with pytest.raises(UserError, match="'projector.kind' pixel_shuffle .* 2 more in front .* visual.drop=leading"):
        build("pixel_shuffle", LEADING)
    with pytest.raises(RuntimeError, match="unflatten"):  # not asked for another grid than it was built for
        build("pixel_shuffle", WHOLE)(random_rows(LEADING), LEADING)


def resampled_one_by_one(projector, rows, grid):
    """Attention as a sum over rows, for each head and query; `projector` is trusted for its linear layers alone."""

    def normed(values, norm=None):
        centred = values - values.mean(-1, keepdim=True)
        values = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return values if norm is None else values * norm.weight + norm.bias

    keys = (normed(rows) + sine_positions(grid, WIDTH, rows.device).double()) @ projector.key.weight.T
    values = normed(rows) @ projector.value.weight.T + projector.value.bias
    queries = normed(projector.queries, projector.query_norm)
    attended = torch.zeros(len(rows), len(queries), OUT_WIDTH, dtype=rows.dtype)
    width = OUT_WIDTH // projector.heads
    for crop, query, head in itertools.product(range(len(rows)), range(len(queries)), range(projector.heads)):
        columns = slice(head * width, (head + 1) * width)
        weights = [math.exp(key[columns] @ queries[query, columns] / math.sqrt(width)) for key in keys[crop]]
        for weight, value in zip(weights, values[crop], strict=True):
            attended[crop, query, columns] += weight / sum(weights) * value[columns]
    return projector.mlp(normed(projector.queries + attended, projector.token_norm))


@torch.no_grad()
@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(3, 4, -1), Grid(3, 4, 2)])
@pytest.mark.parametrize("heads", [1, 4])
def test_resampler_equals_a_plain_softmax(grid, heads):
    projector = build("resampler", grid, queries=5, heads=heads).double()
    for parameter in projector.parameters():  # norms that do something, scores that differ
        parameter.copy_(torch.randn_like(parameter) / 2)
    rows = random_rows(grid).double() * 3 + 1
    expected = resampled_one_by_one(projector, rows, grid)
    # the positions are float32 on both sides; the rest is float64
    assert torch.allclose(projector(rows, grid), expected, rtol=1e-10, atol=1e-10)


def test_resampler_knows_where_a_row_came_from():
    projector, rows = build("resampler", init_std=0.2).double(), random_rows(DROPPED).double()
    turned = projector(rows.flip(1), DROPPED)
    assert (turned - projector(rows, DROPPED)).abs().max() > 1e-3


def test_positions():
    table = sine_positions(Grid(3, 4), 14, torch.device("cpu"))
    for row, column in itertools.product(range(3), range(4)):
        frequencies = [10_000 ** (-k / 3) for k in range(3)]
        expected = [
            f(place * frequency) for place in (row, column) for f in (math.sin, math.cos) for frequency in frequencies
        ]
        # 12 of 14 columns; float32
        assert table[row * 4 + column].tolist() == pytest.approx([*expected, 0.0, 0.0], abs=1e-6)
    assert torch.equal(sine_positions(Grid(3, 4, -1), 14, table.device), table[1:])
    leading = sine_positions(Grid(3, 4, 2), 14, table.device)
    assert torch.equal(leading[2:], table)
    assert len({tuple(row) for row in leading.tolist()}) == 14  # no two rows share a place


@pytest.mark.parametrize("passes_on", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("kind", "grid", "settings"),
    [
        ("mlp", DROPPED, {}),
        ("mlp", LEADING, {}),
        ("pixel_shuffle", DROPPED, {"factor": 2}),
        ("pixel_shuffle", WHOLE, {"factor": 3}),
        ("resampler", DROPPED, {"queries": 7, "heads": 4}),
        ("resampler", LEADING, {}),
    ],
)
def test_operations_equal_the_products_that_run(kind, grid, settings, trained, passes_on):
    projector = build(kind, grid, **settings).requires_grad_(trained)
    rows = random_rows(grid, crops=3).requires_grad_(passes_on)
    # torch's plain attention: its fused kernels compute the scores again in the backward pass, which does not count
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tokens = projector(rows, grid)
        if trained or passes_on:
            tokens.sum().backward()
    assert 3 * projector.operations(grid, trained, passes_on) == counter.get_total_flops()


class Toy(FeatureProjector):
    """The mean of all rows, as one token."""

    def __init__(self, settings, grid, width, out_width):
        super().__init__(settings, grid, width, out_width)
        self.out = nn.Linear(width, out_width)

    def tokens(self, grid):
        return 1

    def forward(self, rows, grid):
        return self.out(self.cast(rows, grid).mean(1, keepdim=True))

    def operations(self, grid, trained, passes_on=False):
        return (2 + 2 * trained + 2 * passes_on) * self.out.weight.numel()


def test_a_kind_of_your_own(monkeypatch):
    monkeypatch.setitem(PROJECTORS, "toy", Toy)
    projector = build_projector(Projector(kind="toy", queries=3), DROPPED, WIDTH, OUT_WIDTH)  # may read any setting
    assert isinstance(projector, Toy)
    assert projector(random_rows(DROPPED), DROPPED).shape == (2, 1, OUT_WIDTH)
    with pytest.raises(UserError, match="'projector.kind' is toy, and no stock"):
        projector.llava_tensors()
    with pytest.raises(UserError, match="did you mean 'toy'"):
        build("toys")


def test_unknown_kinds():
    with pytest.raises(UserError) as caught:
        build("pixel-shuffle")
    assert str(caught.value) == (
        "unknown 'projector.kind' 'pixel-shuffle', did you mean 'pixel_shuffle'? "
        "valid are mlp, pixel_shuffle, resampler"
    )
    with pytest.raises(UserError, match="unknown 'projector.kind' 'zebra': valid are mlp, pixel_shuffle, resampler$"):
        build("zebra")


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="'projector.heads' is 24, .* width 32: set it to 16, for example"):
        build("resampler", heads=24)


@pytest.mark.parametrize("width", [896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 8192])  # Qwen v1 to Qwen3, dense
def test_default_heads_fit_every_language_model(width):
    with torch.device("meta"):
        build_projector(Projector(kind="resampler"), Grid(2, 2), WIDTH, width)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projector.factor=2"], "'projector': 'factor' does nothing with kind: mlp; .* set kind: pixel_shuffle"),
        (["projector.mean_share=0"], "'mean_share' does nothing with kind: mlp; .* set kind: pixel_shuffle"),
        (["projector.kind=pixel_shuffle", "projector.mean_share=2"], "'projector.mean_share' = 2: Input should"),
        (["projector.kind=resampler", "projector.factor=2"], "'factor' does nothing with kind: resampler"),
        (["projector.kind=pixel_shuffle", "projector.queries=9"], "'queries' does nothing .* set kind: resampler"),
        (["projector.heads=8"], "'heads' does nothing with kind: mlp"),
        (["projector.kind=pixel_shuffle", "projector.factor=4"], "'projector.factor' = 4: Input should be 2 or 3"),
        (["projector.kind=''"], "at least 1 character"),
    ],
)
def test_settings_of_another_kind(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("config.yaml", overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_at_their_default_are_no_choice(kind):
    config = load_config("config.yaml", [f"projector.kind={kind}"])
    assert Projector(**config.projector.model_dump()) == config.projector  # as a checkpoint writes it


@pytest.mark.parametrize(("language", "unit", "kinds"), [("", 1e6, ("M", "G")), ("_zh", 1e4, ("万", "亿次"))])
def test_the_table_of_the_docs_holds_what_is_counted(language, unit, kinds):
    """Tokens, parameters and operations at 27 × 27 patches less the first, widths 1152 and 1536."""
    text = (REPO_ROOT / f"docs/changing_the_model{language}.md").read_text(encoding="utf-8")
    for kind in PROJECTORS:
        projector = build_projector(Projector(kind=kind), Grid(27, 27, -1), 1152, 1536)
        cells = next(line for line in text.splitlines() if line.startswith(f"| `{kind}`")).split("|")
        tokens, parameters, operations = (cell.strip() for cell in cells[2:5])
        assert int(tokens) == projector.tokens(Grid(27, 27, -1))
        count = sum(parameter.numel() for parameter in projector.parameters())
        assert float(parameters.removesuffix(kinds[0])) == pytest.approx(count / unit, rel=0.01)
        scale = {"G": 1e9, "亿次": 1e8}[kinds[1]]
        needed = projector.operations(Grid(27, 27, -1), True)
        assert float(operations.removesuffix(kinds[1])) == pytest.approx(needed / scale, rel=0.01)


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_dropout_zeroes_features_in_training_only(backbones, lr):
    """`projector.dropout` of 0.25: a quarter of the features is 0, the others are larger by 4 / 3; none if frozen."""
    config = tiny_config(backbones, projector={"dropout": 0.25}, train={"projector_lr": lr})
    model = MMultiModal.from_config(config, device="cpu")
    seen = []
    model.feature_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    features = torch.ones(4, model.encoder.grid.rows, model.encoder.width)
    torch.manual_seed(0)
    model.train().project(features)
    model.eval().project(features)
    trained, asked = seen
    assert torch.equal(asked, features)
    if lr == 0:
        assert torch.equal(trained, features)
        return
    assert trained.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (trained == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
