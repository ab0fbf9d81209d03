"""A model that reads the colour off the photo; `conftest.py` has photos of one colour each, and questions."""

from types import SimpleNamespace

from answering.request import Reply
from dataset.records import Entry, Turn
from errors import UserError
from visual.transform import load_image
from visual_plan import VisualPlan

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "黑色": (0, 0, 0)}


def captions_of(source):
    """An entry for each photo, with two captions."""
    return [
        Entry(source, "caption", (Turn("<|extra_0|>\nWhat is it?", texts, images=(ID,)),))
        for ID, name in enumerate(COLOURS)
        for texts in [(f"A wall that is plain {name} from left to right.", f"This plain {name} wall fills the photo.")]
    ]


class ColourModel:
    """Answers in place of model and `Answerer`: the colour of the first photo, or "hello" without one.

    It remembers (question, colours, number of earlier messages), and in `places` the number of photos in each question
    of a dialogue, for every call. After `stop_after` answers it raises KeyboardInterrupt.
    """

    def __init__(self, stop_after=None):
        self.calls, self.places = [], []
        self.stop_after = stop_after
        self.chat = SimpleNamespace(
            question=lambda text, plans: (text, len(plans)), answer=lambda text: text, plan=VisualPlan(1)
        )

    def answer_many(self, requests):
        for photos, messages in requests:
            if self.stop_after is not None and len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            try:
                colours = [load_image(photo).getpixel((0, 0)) for photo in photos]
            except UserError as error:
                yield error
                continue
            self.calls.append((messages[-1][0], colours, len(messages) - 1))
            self.places.append([count for _, count in messages[::2]])
            names = [name for name, colour in COLOURS.items() if colour in colours[:1]]
            yield Reply(names[0] if names else "hello", "stop", 1, 1)
