"""Each test has a folder of its own with a recipe, data, and the command."""

import pytest
from shoal_process import Shoal


@pytest.fixture
def shoal(tmp_path):
    command = Shoal(tmp_path)
    yield command
    command.close()
