"""A running server for all tests of this folder."""

import pytest

from tests.telling import TellingEngine, client_of, running


@pytest.fixture(scope="session")
def engine():
    return TellingEngine()


@pytest.fixture(scope="session")
def address(engine):
    with running(engine) as address:
        yield address


@pytest.fixture(scope="session")
def client(address):
    with client_of(address) as client:
        yield client
