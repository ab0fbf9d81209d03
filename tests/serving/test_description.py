"""Schemathesis asks the server by the server's own description: no request makes it fail, and answers are as described.

Two rules are not in the description, so a request that fits it may be refused: roles take turns, and the model's name.
"""

import subprocess
import sys

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.telling import NAME, photo, user, words

EXAMPLES = settings(
    max_examples=15, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip


@pytest.fixture(scope="module")
def operations(address):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    return {operation.path: operation for operation in (result.ok() for result in schema.get_all_operations())}


def statuses(operation, mode, change=lambda body: body):
    """Ask, check the answers against the description, and return their statuses."""
    found = []

    @EXAMPLES
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.body = change(case.body)
        response = case.call()
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        found.append(response.status_code)

    check()
    return found


def test_the_description_names_every_path(operations, address):
    assert set(operations) == {"/v1/chat/completions", "/v1/models", "/health", "/metrics"}
    for path in ("/v1/models", "/health", "/metrics"):
        assert set(statuses(operations[path], GenerationMode.POSITIVE)) == {200}


def test_requests_that_fit_the_description(operations, engine):
    chat, before = operations["/v1/chat/completions"], len(engine.asked)
    assert set(statuses(chat, GenerationMode.POSITIVE)) <= {200, 400, 404}
    asked = {"model": NAME, "messages": [user(photo(), words("What?"))]}
    answered = statuses(chat, GenerationMode.POSITIVE, lambda body: body | asked)
    assert 200 in answered
    assert len(engine.asked) > before


def test_requests_that_do_not_fit_the_description(operations):
    assert set(statuses(operations["/v1/chat/completions"], GenerationMode.NEGATIVE)) == {400}


@pytest.mark.nightly
def test_schemathesis_own_run_finds_nothing(address, tmp_path):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--max-examples", "300", "--seed",
        "1", "--generation-database", "none", "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:]
