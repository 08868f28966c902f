import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models here are tiny: threads gain nothing, and wait for each other where a core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
