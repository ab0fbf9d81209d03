"""Where the model looked: maps over the photos for an answer or a part of it. Called by `Answerer.look`.

Two methods, on one extra pass over prompt and answer:
  * gradient: gradient × input at the photos' tokens, the sum of its absolute values. It says how much a small change of
    what the model sees there would change the logarithm of the answer's probability, in either direction.
  * attention: the mean attention, over heads and chosen layers, of the positions that predict the answer's tokens. A
    token passes on what it read from others, so attention often goes elsewhere than to what the answer depends on.
`docs/looking.md` has how often each points to the right object in the demo.

Shapes: T tokens, S tokens of the answer, N tokens of a photo, Dl width.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from answering.request import Picture, Request, encode_picture, make_prompt, read_picture, with_plans
from errors import UserError, shortened
from model.model import MMultiModal
from qwen.attention import AttentionRecord

Method = Literal["gradient", "attention"]
LONG_EDGE = 256  # values along the longer edge of a map; an encoder has 16 to 40 patches there, a tile as many
FP16_SCALE = 1024.0  # in fp16, most gradients of a certain answer would round to 0
WORD_CHARACTER = re.compile(r"\w")
# Characters of languages without spaces: kana, CJK ideographs and their extensions; there, a token counts as a word.
SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class Word(NamedTuple):
    """A word of an answer, and its characters `answer[start:end]`."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Heatmap:
    """How much the model looked at each place of one photo.

    Attributes:
        values: (rows, columns) float32, an even grid over the upright photo in its proportions; they are 0 or more, and
            those of all photos of the dialogue sum to 1. NaN where no token of the model shows the photo.
        method: as in `look`.
    """

    values: np.ndarray
    method: Method

    @property
    def peak(self) -> tuple[float, float]:
        """Place of the largest value: x and y as fractions of width and height."""
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        rows, columns = self.values.shape
        return float((column + 0.5) / columns), float((row + 0.5) / rows)


def answer_words(model: MMultiModal, answer: str) -> list[Word]:
    """Return the words of an answer in order; punctuation is left out.

    A word consists of whole tokens, because the model predicts tokens. In Chinese each token is a word.
    """
    spans: list[tuple[int, int]] = []
    for start, end in dict.fromkeys(_token_spans(model, answer)):  # several tokens may share one character
        boundary = answer[max(start - 1, 0) : start + 1]
        joined = len(boundary) == 2 and all(map(WORD_CHARACTER.match, boundary)) and not SPACELESS.search(boundary)
        if spans and joined:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    words = []
    for start, end in spans:
        text = answer[start:end]
        start += len(text) - len(text.lstrip())
        words.append(Word(text.strip(), start, start + len(text.strip())))
    return [word for word in words if WORD_CHARACTER.search(word.text)]


def find_word(answer: str, text: str) -> tuple[int, int]:
    """Return the characters of the first `text` in the answer, in capital or small letters.

    Raises:
        UserError: the answer does not contain it.
    """
    found = re.search(re.escape(text), answer, re.IGNORECASE) if text else None
    if found is None:
        raise UserError(f"{shortened(repr(text), 60)} is not in the answer, choose a word of it: {shortened(answer)}")
    return found.span()


def look(
    model: MMultiModal,
    request: Request,
    answer: str,
    span: tuple[int, int] | None = None,
    method: Method = "gradient",
    layers: Sequence[int] | None = None,
    encode: Callable[[Picture], torch.Tensor] | None = None,
) -> list[Heatmap]:
    """Return the map of each photo of a dialogue, in reading order.

    Args:
        model: in eval mode; LoRA counts as in answering.
        request: the dialogue up to the question.
        answer: a text; usually, but not necessarily, what the model answered.
        span: first and last + 1 character of the part of the answer that is explained, of `answer_words` or
            `find_word`; tokens that lie partly in it count. None: the whole answer.
        layers: for `attention`, the layers from 0; None: all.
        encode: photo → encoder features (crops, R, Dv), from a cache; None: `encode_picture`.

    Raises:
        UserError: no photo, an empty answer or span, a projector whose tokens have no places, a broken photo, or a
            dialogue longer than the language model's context.
    """
    if method not in get_args(Method):
        raise UserError(f"the heatmap's method is {method!r}, not one of {', '.join(get_args(Method))}")
    if not request.photos:
        raise UserError("there is no photo to look at: give one with the question")
    places = model.feature_proj.places(model.encoder.grid)
    count = model.LLM.config.num_hidden_layers
    chosen = frozenset(range(count) if layers is None else layers)
    if not chosen or not chosen <= set(range(count)):
        raise UserError(f"layers {sorted(chosen)}: the language model has the layers 0 to {count - 1}")
    pictures = [read_picture(model, photo) for photo in request.photos]
    ids, targets = _tokens(model, pictures, request, answer, span)
    encode = encode or functools.partial(encode_picture, model)
    with torch.no_grad():
        features = [encode(picture) for picture in pictures]
        embeddings = model.language_model.embed(ids, model.project(torch.cat(features)))  # (1, T, Dl)
    relevance = _gradient if method == "gradient" else _attention
    by_token = relevance(model, embeddings, ids, targets, chosen).double().cpu()  # (T,)
    shown = by_token[ids[0].cpu() == model.processor.chat.image_token_id]
    maps = [
        _photo_map(model, picture, places.numpy(), values.numpy())
        for picture, values in zip(pictures, shown.split([picture.plan.tokens for picture in pictures]), strict=True)
    ]
    total = sum(np.nansum(values) for values in maps) or 1.0
    return [Heatmap((values / total).astype(np.float32), method) for values in maps]


def _tokens(
    model: MMultiModal, pictures: list[Picture], request: Request, answer: str, span: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (1, T) of dialogue and answer, and the positions (S,) of the explained tokens of the answer."""
    chat = model.processor.chat
    spans = _token_spans(model, answer)
    start, end = (0, len(answer)) if span is None else span
    explained = [number for number, (first, last) in enumerate(spans) if first < end and last > start]
    if not explained:
        part = "" if span is None else f" between the characters {start} and {end}"
        raise UserError(f"the answer {shortened(repr(answer))} is empty{part}: there is nothing to explain")
    messages = [*request.messages, chat.answer(answer)]
    ids = make_prompt(model, pictures, messages, max_new_tokens=1).ids  # checks the length
    _, labels = chat.render(with_plans(messages, [picture.plan for picture in pictures]))
    opening = len(ids) - 1 - ids[::-1].index(chat.start_id)  # of the answer: earlier ones are supervised too
    answered = [place for place in range(opening, len(ids)) if labels[place] != -100]
    assert len(answered) == len(spans) + 1, "the answer's tokens and its end token"
    return (
        torch.tensor([ids], device=model.device),
        torch.tensor([answered[number] for number in explained], device=model.device),
    )


def _token_spans(model: MMultiModal, answer: str) -> list[tuple[int, int]]:
    """Return the characters of each token of the answer; tokens that end within a character share its piece."""
    tokenizer, chat = model.processor.tokenizer, model.processor.chat
    ids, labels = chat.render([chat.typed_question("", 0), chat.answer(answer)])
    tokens = [token for token, label in zip(ids, labels, strict=True) if label != -100][:-1]
    place = len(answer) - len(answer.lstrip())  # the prompt format strips answers
    spans: list[tuple[int, int]] = []
    pending: list[int] = []
    for number, token in enumerate(tokens):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or number == len(tokens) - 1:
            spans += [(place, place + len(text))] * len(pending)
            place, pending = place + len(text), []
    return spans


def _states(
    model: MMultiModal, embeddings: torch.Tensor, targets: torch.Tensor, record: AttentionRecord | None = None
) -> torch.Tensor:
    """Last states (S, Dl) at the positions that predict the tokens at `targets`."""
    length = embeddings.shape[1]
    positions = torch.arange(length, device=embeddings.device).unsqueeze(0)
    selected = torch.zeros(1, length, dtype=torch.bool, device=embeddings.device)
    selected[0, targets - 1] = True
    return model.language_model.packed_states(embeddings, positions, ((length,),), selected, record=record)


def _gradient(
    model: MMultiModal, embeddings: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor, layers: frozenset[int]
) -> torch.Tensor:
    """Sum over the width of |gradient × input| of each token (T,); the gradient of the tokens' log-probability."""
    with torch.enable_grad():
        inputs = embeddings.detach().requires_grad_()
        logits = model.language_model.head(_states(model, inputs, targets))  # (S, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logarithms = logits.log_softmax(-1).gather(1, ids[0, targets].unsqueeze(1))
        (gradient,) = torch.autograd.grad(logarithms.sum() * FP16_SCALE, inputs)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * inputs.detach().to(wide)).abs().sum(-1)[0] / FP16_SCALE


@torch.no_grad()
def _attention(
    model: MMultiModal, embeddings: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor, layers: frozenset[int]
) -> torch.Tensor:
    """Mean attention weight of each token (T,)."""
    record = AttentionRecord(targets - 1, layers)
    _states(model, embeddings, targets, record)
    return torch.stack([weights.mean(0).cpu() for weights in record.weights.values()]).mean(0)


def _photo_map(model: MMultiModal, picture: Picture, places: np.ndarray, by_token: np.ndarray) -> np.ndarray:
    """Spread the values of a photo's tokens (N,) over its map (rows, columns); NaN where no patch shows it.

    A token's value is shared equally by its patches, and that of a patch by the map's cells in proportion to the area
    that they have in common; crops that show the same place add up.
    """
    width, height = picture.image.size
    scale = LONG_EDGE / max(width, height)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    total, covered = np.zeros((rows, columns)), np.zeros((rows, columns))
    seen = places >= 0
    patches = np.bincount(places[seen], minlength=picture.plan.crop_tokens)  # of each token
    sizes = [patch / crop for patch, crop in zip(model.encoder.patch_size, model.encoder.size, strict=True)]
    for box, tokens in zip(_crop_boxes(model, picture), by_token.reshape(-1, picture.plan.crop_tokens), strict=True):
        left, top, right, bottom = box
        # edges of the patches as fractions of the photo
        down = top + (bottom - top) * sizes[0] * np.arange(places.shape[0] + 1)
        across = left + (right - left) * sizes[1] * np.arange(places.shape[1] + 1)
        vertical, horizontal = _common(rows, down), _common(columns, across)
        values = np.where(seen, tokens[places] / np.maximum(patches[places], 1), 0.0)
        total += (vertical / np.diff(down)) @ values @ (horizontal / np.diff(across)).T
        covered += (vertical * rows) @ seen @ (horizontal * columns).T
    return np.where(covered >= 0.5, total, np.nan)


def _common(cells: int, edges: np.ndarray) -> np.ndarray:
    """Length that cell i of an even grid of `cells` over 0 to 1 has in common with patch j, (cells, patches)."""
    grid = np.arange(cells + 1) / cells
    ends = np.minimum(grid[1:, None], edges[None, 1:])
    return np.maximum(ends - np.maximum(grid[:-1, None], edges[None, :-1]), 0.0)


def _crop_boxes(model: MMultiModal, picture: Picture) -> list[tuple[float, ...]]:
    """Left, top, right and bottom edge of each crop as fractions of the photo: the whole photo, then the tiles."""
    (width, height), plan = picture.image.size, picture.plan
    edges = model.processor.transform.seen(width, height)
    whole = tuple(edge / length for edge, length in zip(edges, (width, height, width, height), strict=True))
    tiles = [
        (column / plan.tile_columns, row / plan.tile_rows, (column + 1) / plan.tile_columns, (row + 1) / plan.tile_rows)
        for row in range(plan.tile_rows)
        for column in range(plan.tile_columns)
    ]
    return [whole, *tiles]
