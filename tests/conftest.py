"""Fixtures of the whole test suite.

TINYTORCH_TEST_DEVICES names the devices that tests with the fixture `device` run on, "cpu" unless set:
"cpu,array_api_strict", "torch", "cuda" …
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # `tinytorch test` runs a checkpoint with pytest alone
    import hypothesis

    # How long an example takes says nothing about it on a busy machine.
    hypothesis.settings.register_profile("tinytorch", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("tinytorch")

pytest.register_assert_rewrite("tests.reference.near")

DEVICES = [name.strip() for name in os.environ.get("TINYTORCH_TEST_DEVICES", "cpu").split(",") if name.strip()]
ROOT = Path(__file__).resolve().parent.parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.device)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the devices under test, set as the default device while the test runs."""
    import tinytorch

    before = tinytorch.get_default_device()
    tinytorch.set_default_device(request.param)
    yield request.param
    tinytorch.set_default_device(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT
