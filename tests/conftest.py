"""What every test starts from."""
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    "The same weights in every run of the tests: some releases of torch seed each process anew."
    torch.manual_seed(0)
