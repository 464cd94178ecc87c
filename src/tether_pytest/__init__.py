"""The plugin of pytest: `assert_tied`.

Pytest imports this module whenever it starts, so it imports nothing of Tether and not Keras: the fixture does, when a
test asks for it. Beside the package, as importing anything in `tether` imports Keras.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def assert_tied() -> Callable[[object, str, str], None]:
    """A function of a model and two names of weights, which fails unless both read the same stored weight."""
    from tether_pytest.assertion import assert_tied

    return assert_tied
