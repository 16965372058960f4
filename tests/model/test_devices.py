"""Devices are refused by name, before anything is loaded."""

import pytest
import torch

from genemodel.errors import ConfigError
from genemodel.model import devices
from genemodel.model.devices import check_device, device_of, why_not_compiled
from genemodel.model.settings import ModelSettings


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


CUDA = torch.device("cuda")
A100, T4, V100 = (8, 0), (7, 5), (7, 0)


def ways(width=64, heads=1, **options):
    return check_device(ModelSettings(width=width, heads=heads), CUDA, **options)


def test_a_new_gpu_calculates_in_half_precision_and_says_nothing():
    fit = ways(capability=A100)
    assert (fit.precision, fit.attention, fit.remarks) == ("bf16-mixed", "flash", ())


@pytest.mark.parametrize("capability", [T4, V100])
def test_an_old_gpu_calculates_in_full_and_is_no_choice_for_half(capability):
    fit = ways(capability=capability)
    assert (fit.precision, fit.attention) == ("32-true", "padded")
    number = ".".join(map(str, capability))
    assert f"compute capability {number} is below 8.0" in fit.remarks[0]
    with pytest.raises(
        ConfigError, match=f"capability {number}.*trainer.precision=32-true or auto"
    ):
        ways(capability=capability, precision="bf16-mixed")


def test_full_precision_is_padded_and_said():
    fit = ways(capability=A100, precision="32-true")
    assert (fit.precision, fit.attention) == ("32-true", "padded")
    assert "padded to the context" in fit.remarks[0]


@pytest.mark.parametrize(("width", "heads"), [(320, 1), (60, 5)])
def test_heads_without_a_kernel_are_padded_and_said(width, heads):
    fit = ways(width, heads, capability=A100)
    assert (fit.precision, fit.attention) == ("bf16-mixed", "padded")
    assert f"heads are {width // heads} wide" in fit.remarks[0]


def test_a_cpu_takes_either_precision():
    for asked, given in (
        ("auto", "32-true"), ("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"),
    ):  # fmt: skip
        fit = check_device(ModelSettings(), torch.device("cpu"), asked)
        assert (fit.precision, fit.attention, fit.compiled) == (given, "cells", False)


def test_a_missing_compiler_is_a_remark(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert check_device(ModelSettings(), cpu, compiled=True).compiled
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    fit = check_device(ModelSettings(), cpu, compiled=True)
    assert not fit.compiled
    assert "g++ or clang++ is not on the PATH" in fit.remarks[0]


def test_what_torch_compile_needs_is_named(monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    assert why_not_compiled(cuda) == "the package triton is not installed"
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "gcc or clang" in why_not_compiled(cuda)
    monkeypatch.setenv("CC", "mycc")
    assert "mycc is not on the PATH" in why_not_compiled(cuda)
    (tmp_path / "mycc").write_text("")
    (tmp_path / "mycc").chmod(0o755)
    assert why_not_compiled(cuda) is None
