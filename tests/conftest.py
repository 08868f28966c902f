"""Without a GPU the Triton kernels run under Triton's interpreter, chosen before Triton loads."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def fresh():
    """Nothing compiled before, the same random numbers in every test."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def fresh_inference(fresh):
    """The same, and no gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def rates_of_its_kind(monkeypatch):
    """Plans do not depend on how busy the machine is that runs the tests."""
    monkeypatch.setattr("flashsvd_compile.pipeline.rates_of", lambda *_: None)
