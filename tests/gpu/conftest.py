"""These tests need a CUDA device: skipped without one, failures there if RLT_REQUIRE_CUDA=1 says there must be one."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if os.environ.get("RLT_REQUIRE_CUDA") == "1":
            pytest.fail("RLT_REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("needs a CUDA device")
