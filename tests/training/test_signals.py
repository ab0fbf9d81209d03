"""A signal is noted for the loop to read; a second one has its usual effect."""

import signal

import pytest

from training.signals import SIGNALS, StopSignals


@pytest.fixture
def came():
    """The signals that reach handlers set before ours."""
    numbers = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_has_its_usual_effect(came, monkeypatch, first, second):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopSignals() as stop:
        signal.raise_signal(first)
        assert (stop.received, came) == (first, [])
        signal.raise_signal(second)
        assert (stop.received, came) == (first, [second])
