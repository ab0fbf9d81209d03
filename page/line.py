"""The line before the device: it works for one session at a time, in the order of arrival."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class WaitingLine:
    """Places of those who wait, and of the one whose turn it is."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._moved = threading.Condition()

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Take the last place; leave the line at the end, whatever happened."""
        place = Place(self._places, self._moved)
        with self._moved:
            self._places.append(place)
        try:
            yield place
        finally:
            with self._moved:
                self._places.remove(place)
                self._moved.notify_all()


class Place:
    """A place in a line."""

    def __init__(self, places: list["Place"], moved: threading.Condition) -> None:
        self._places, self._moved = places, moved

    def ahead(self, seconds: float) -> int:
        """Return how many are before this place, 0: it is its turn; else wait for that many seconds at most first."""
        with self._moved:
            if self._places[0] is not self:
                self._moved.wait(seconds)
            return self._places.index(self)
