"""Text of one training sample with its supervision, and the page `samples.html` of a run folder.

`watch.py` prints `describe_sample` at the start and calls `SampleSheet.update` at every evaluation.
"""

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import orjson
import torch

from answering.answer import Answerer
from config import IMAGE_TAG, Generate
from dataset.image_caption_dataset import ImageCaptionDataset, entry_messages
from dataset.records import Entry, Photo
from errors import UserError
from evaluation import metrics
from evaluation.web_page import read_thumbnail
from model.model import MMultiModal
from qwen.chat import IGNORE_INDEX, ChatFormat
from training.run_log import write_whole
from training.sample_page import Attempt, ShownQuestion, render_page
from visual.transform import load_image

Photos = Mapping[int, Photo] | Sequence[Photo]  # by ID

OPEN, CLOSE = "⟦", "⟧"  # around supervised text; readable without colours, and not used as punctuation
SHOWN_QUESTIONS = 4  # of a packed sample; sixteen questions would fill the screen
CONSIDERED = 100_000  # entries of which the questions are chosen; reading millions would take minutes
MAX_NEW_TOKENS = 64  # of an answer, which is displayed and not part of a score

logger = logging.getLogger(__name__)


def describe_sample(dataset: ImageCaptionDataset, index: int) -> str:
    """Return a sample as text: special tokens in full, photos as `<|extra_0|> × N`, supervised text in `⟦…⟧`.

    The questions of a packed sample follow one another; a line with its number precedes what is its own.
    """
    try:
        sample = dataset.tokens(index)
    except UserError as error:
        return f"sample {index} cannot be shown: {error}"
    ids, labels, lengths = sample.input_ids.tolist(), sample.labels.tolist(), sample.lengths
    supervised = sum(label != IGNORE_INDEX for label in labels)
    lines = [f"sample {index}: {len(ids)} tokens, the {supervised} in double brackets are supervised"]
    start = 0
    for number, length in enumerate(lengths[: SHOWN_QUESTIONS + 1]):
        if number:
            lines.append(f"--- question {number} of {len(lengths) - 1} on the same photo ---")
        end = start + length
        lines.append(_marked(dataset.chat, ids[start:end], labels[start:end]).strip("\n"))
        start = end
    if len(lengths) > SHOWN_QUESTIONS + 1:
        lines.append(f"--- and {len(lengths) - 1 - SHOWN_QUESTIONS} more questions ---")
    return "\n".join(lines)


def _marked(chat: ChatFormat, ids: list[int], labels: list[int]) -> str:
    """Return the text of `ids`, decoded in runs of one kind, because a character may consist of several tokens."""
    kinds = [
        "photo" if token == chat.image_token_id else "text" if label == IGNORE_INDEX else "supervised"
        for token, label in zip(ids, labels, strict=True)
    ]
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        if kinds[start] == "photo":
            crops, tokens = (end - start) // chat.plan.crop_tokens, chat.plan.crop_tokens
            text += f"{IMAGE_TAG} × {tokens}" * crops
        else:
            run = chat.tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text += OPEN + run + CLOSE if kinds[start] == "supervised" else run
        start = end
    return text


def choose_entries(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """Draw up to `count` entries; sources alternate, question types of a source alternate.

    Each photo is used once if possible. The same entries and seed give the same choice. Entries of one question, one
    for each answer (`data.answers: all`), are joined.
    """
    drawn = random.Random(f"samples {seed}").sample(range(len(entries)), min(len(entries), CONSIDERED))
    of_kind: Counter[tuple[str, str]] = Counter()
    by_source: dict[str, list[tuple[int, int, Entry]]] = {}
    for index in drawn:
        entry = entries[index]
        kind = (entry.source, entry.turns[0].type or entry.type)
        by_source.setdefault(entry.source, []).append((of_kind[kind], index, entry))
        of_kind[kind] += 1
    queues = [
        [(index, entry) for _, index, entry in sorted(queue, key=lambda numbered: numbered[0])]
        for _, queue in sorted(by_source.items())
    ]
    dealt = [item for item in chain.from_iterable(zip_longest(*queues)) if item is not None]
    chosen, again, seen = [], [], set()
    for index, entry in dealt:
        (again if seen.intersection(entry.images) else chosen).append(index)
        seen.update(entry.images)
        if len(chosen) == count:
            break
    return list(dict.fromkeys(_with_all_answers(entries, index) for index in chosen + again))[:count]


def _with_all_answers(entries: Sequence[Entry], index: int) -> Entry:
    """Return an entry with the answers of its neighbours that ask the same of the same photo."""

    def of(entry: Entry) -> Entry:
        return replace(entry, turns=(replace(entry.turns[0], answers=()), *entry.turns[1:]))

    first = last = index
    while first > 0 and of(entries[first - 1]) == of(entries[index]):
        first -= 1
    while last + 1 < len(entries) and of(entries[last + 1]) == of(entries[index]):
        last += 1
    answers = tuple(answer for number in range(first, last + 1) for answer in entries[number].turns[0].answers)
    entry = entries[index]
    return replace(entry, turns=(replace(entry.turns[0], answers=answers), *entry.turns[1:]))


class SampleSheet:
    """Page `samples.html`: fixed questions with photo, reference answers, and an answer from every evaluation.

    `samples.json` in the same folder stores the answers for `--resume`. Only for the first process. The page shows the
    error message of a bad photo or a failed answer; such an error does not stop the run.

    Args:
        folder: existing run folder.
        train: entries for the questions if there is no validation set; the page then says so.
        val: entries of the validation set.
        photos: by ID.
        seed: seed of the choice of questions.
        resumed_step: answers after this step are removed, because the run repeats these steps; 0: a new page.
        count: number of questions.
    """

    def __init__(
        self,
        folder: Path,
        train: Sequence[Entry],
        val: Sequence[Entry],
        photos: Photos,
        seed: int,
        resumed_step: int = 0,
        count: int = 10,
    ) -> None:
        self.folder = folder
        self.held_out = len(val) > 0
        self._warned = False
        self._entries = choose_entries(val if len(val) else train, count, seed)
        self._photos = photos
        self.samples = [_sample(entry, photos) for entry in self._entries]
        if resumed_step:
            self._read_answers(resumed_step)

    @torch.no_grad()
    def update(self, model: MMultiModal, step: int) -> None:
        """Answer the questions by greedy decoding, at most 64 tokens each, and write the page.

        It uses no random numbers, so it does not change training.

        Args:
            model: without the DDP wrapper and in eval mode; the caller sets it back to training mode.
            step: step of the answers; a second call at the same step replaces them.
        """
        assert not model.training, "a model that answers must be in eval mode"
        settings = model.config.generate
        limit = min(MAX_NEW_TOKENS, settings.max_new_tokens)
        greedy = settings.model_copy(update={"temperature": 0.0, "max_new_tokens": limit})
        answerer = Answerer(model)
        # with train.compile, each answer length could trigger another compilation
        with torch.compiler.set_stance("force_eager"):
            for entry, sample in zip(self._entries, self.samples, strict=True):
                sample.attempts[step] = self._attempt(answerer, entry, greedy)
        try:
            self._write()
        except Exception as error:  # training must continue
            if not self._warned:
                self._warned = True
                details = None if isinstance(error, OSError) else error
                file = self.folder / "samples.html"
                logger.warning("%s cannot be written (%r); training continues", file, error, exc_info=details)

    def _attempt(self, answerer: Answerer, entry: Entry, settings: Generate) -> Attempt:
        messages = entry_messages(entry, answerer.model.processor.chat, [])[:1]
        try:
            images = [load_image(self._photos[ID].picture) for ID in entry.turns[0].images]
            text = answerer.stream_messages(images, messages, settings).rest().text
        except UserError as error:
            return Attempt(str(error), failed=True)
        except Exception as error:  # the page shows the error; training must continue
            logger.warning("a question of samples.html got no answer", exc_info=error)
            return Attempt(f"{type(error).__name__}: {error}", failed=True)
        return Attempt(text, right=metrics.accuracy(text, entry.turns[0].answers) >= 0.5)

    def _write(self) -> None:
        state = [{"key": sample.key, "attempts": _to_json(sample.attempts)} for sample in self.samples]
        write_whole(self.folder / "samples.json", orjson.dumps(state, option=orjson.OPT_INDENT_2))
        page = render_page(self.folder.name, self.samples, self.held_out)
        write_whole(self.folder / "samples.html", page.encode("utf-8", errors="replace"))

    def _read_answers(self, resumed_step: int) -> None:
        """Load the answers up to `resumed_step` of unchanged questions."""
        file = self.folder / "samples.json"
        try:
            state = orjson.loads(file.read_bytes())
            kept = {item["key"]: _from_json(item["attempts"], resumed_step) for item in state}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): samples.html begins anew", file, error)
            return
        for sample in self.samples:
            sample.attempts |= kept.get(sample.key, {})


def _to_json(attempts: dict[int, Attempt]) -> dict[str, Any]:
    return {str(step): [attempt.text, attempt.right, attempt.failed] for step, attempt in attempts.items()}


def _from_json(attempts: dict[str, Any], last: int) -> dict[int, Attempt]:
    return {
        int(step): Attempt(str(text), bool(right), bool(failed))
        for step, (text, right, failed) in attempts.items()
        if int(step) <= last
    }


def _sample(entry: Entry, photos: Photos) -> ShownQuestion:
    turn = entry.turns[0]
    pictures = [read_thumbnail(photos[ID]) for ID in turn.images]
    return ShownQuestion(
        key=" ".join([*(photos[ID].key for ID in entry.images), turn.question, *turn.answers]),
        source=entry.source,
        type=turn.type or entry.type,
        pictures=pictures,
        question=turn.question.replace(IMAGE_TAG, "", len(turn.images)).strip(),
        truths=turn.answers,
    )
