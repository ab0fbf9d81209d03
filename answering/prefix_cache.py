"""Keys and values of recent prompts and answers, for prompts that begin like one of them. Used by `answer.py`.

A prompt that goes on with a dialogue, edits a question of it or asks again about one of its photos reads its new tokens
only. Callers exclude each other: the cache has no lock.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from transformers import DynamicCache

from answering.request import OpenPrompt, common_length
from compat import cache_prefix


@dataclass(eq=False)
class CachedSequence:
    """A prompt and the part of its answer that was read.

    Attributes:
        key: `prefix_key` of the prompt.
        photos: hashes of its photos, in reading order.
        prompt_length: number of its tokens.
        ids: tokens that were read, in the order of `states`.
        states: their keys and values.
        unfinished: its answer is being made, so more tokens will follow.
        size: bytes of `states` when it was kept.
    """

    key: Hashable
    photos: tuple[str, ...]
    prompt_length: int
    ids: list[int] = field(default_factory=list)
    states: DynamicCache = field(default_factory=DynamicCache)
    unfinished: bool = True
    size: int = 0

    def shared_length(self, prompt: OpenPrompt) -> int:
        """Number of leading tokens that a prompt shares; never all of the prompt, whose last token gives the answer.

        The shared part never ends within a photo, because equal photos have equal placeholders in both prompts.
        """
        same_photos = common_length(self.photos, prompt.photos)
        end = prompt.spans[same_photos][0] if same_photos < len(prompt.spans) else len(prompt.ids) - 1
        return common_length(self.ids[:end], prompt.ids[:end])


class PrefixCache:
    """Sequences by last use; the least recently used are dropped first.

    Each prompt lives on, while there is room, whatever other prompts share with it. The answer behind it gives way to
    another answer.

    Args:
        most_bytes: of all that is kept. Answers that are being made also need memory of their own. In 1 GiB, there is
            room for 87 dialogues of 1000 tokens (about one photo each) of Qwen2.5-0.5B and 18 of Qwen2.5-7B in bf16 (12
            and 56 KiB a token), and for 2 of Qwen-7B (v1), which has no grouped heads (512 KiB).
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.sequences: list[CachedSequence] = []  # least recently used first

    def begin(self, prompt: OpenPrompt, key: Hashable) -> CachedSequence:
        """Return a sequence for `prompt`, with the longest prefix of it that is kept."""
        started = CachedSequence(key, prompt.photos, len(prompt.ids))
        lengths = {sequence: sequence.shared_length(prompt) for sequence in self.sequences if sequence.key == key}
        source = max(lengths, key=lengths.__getitem__, default=None)
        if source is None or lengths[source] == 0:
            return started
        shared = lengths[source]
        started.ids, started.states = source.ids[:shared], cache_prefix(source.states, shared)
        self.sequences.remove(source)
        self.sequences.append(source)
        # all whose prompt lives on in the new one, not only the source: a dialogue shares as much of its first
        # question as that question asked again does, so copies of the question would fill the cache
        covered = {one for one, length in lengths.items() if not one.unfinished and length >= one.prompt_length - 1}
        self.sequences = [one for one in self.sequences if one not in covered]
        return started

    def keep(self, sequence: CachedSequence) -> None:
        """Keep a sequence as the most recently used, if it has room."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
        sequence.size = sum(layer.keys.nbytes + layer.values.nbytes for layer in sequence.states.layers)
        if sequence.size <= self.most_bytes:
            self.sequences.append(sequence)
        while sum(kept.size for kept in self.sequences) > self.most_bytes:
            self.sequences.pop(0)

    def clear(self) -> None:
        self.sequences.clear()
