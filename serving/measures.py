"""What `/metrics` tells, in Prometheus' text format. Used by `app.py`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from answering.request import Reply
from serving.gate import Queue

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # upper limits of the histograms' bars


class Measures:
    """Counters of one server."""

    def __init__(self, queue: Queue) -> None:
        self._registry = registry = CollectorRegistry()
        self._responses = Counter("vqa_responses", "Answers to requests, by HTTP status", ["status"], registry=registry)
        self._prompt = Counter("vqa_prompt_tokens", "Tokens of prompts, photos included", registry=registry)
        self._cached = Counter("vqa_cached_tokens", "Of these, computed for an earlier request", registry=registry)
        self._answer = Counter("vqa_answer_tokens", "Tokens of answers", registry=registry)
        self._first = Histogram(
            "vqa_first_token_seconds",
            "From the turn of a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self._seconds = Histogram("vqa_request_seconds", "Waiting included", buckets=SECONDS, registry=registry)
        Gauge("vqa_waiting", "Requests that wait", registry=registry).set_function(lambda: queue.waiting)
        Gauge("vqa_running", "Requests that are answered now", registry=registry).set_function(queue.turn.locked)

    def ended(self, status: int, seconds: float) -> None:
        """Count a request that ended with an HTTP status; 499: the client was gone first."""
        self._responses.labels(status).inc()
        self._seconds.observe(seconds)

    def count(self, reply: Reply) -> None:
        """Add a finished answer."""
        self._prompt.inc(reply.tokens_in)
        self._cached.inc(reply.tokens_reused)
        self._answer.inc(reply.tokens_out)
        self._first.observe(reply.seconds_to_first_token)

    def text(self) -> bytes:
        return generate_latest(self._registry)
