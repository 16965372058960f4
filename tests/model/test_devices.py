"""Devices are refused by name, before anything is loaded."""

import pytest
import torch

from genemodel.errors import ConfigError
from genemodel.model.devices import device_of


def test_auto_and_cpu_are_always_there():
    assert device_of("auto").type in ("cpu", "cuda")
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpu", "no such device"), ("cuda:-1", "no such device"), ("cuda:99", "device=cuda:99, but")],
)
def test_what_is_not_here_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        device_of(name)
