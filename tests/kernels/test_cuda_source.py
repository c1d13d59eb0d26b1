"""What is said where a kernel in CUDA C++ cannot be had."""

import ctypes

import pytest

from tunefork.kernels import cuda_source
from tunefork.kernels.cuda_source import CudaSourceError, compiled


def test_without_nvrtc_its_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "99.1")
    with pytest.raises(CudaSourceError, match=r"libnvrtc\.so\.99 is not found"):
        compiled("", "nothing")


def test_a_driver_that_knows_no_tensor_maps_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_source, "_library", lambda _: ctypes.CDLL(None))
    with pytest.raises(CudaSourceError, match=r"older than CUDA 12: .*cuTensorMapEncodeTiled"):
        cuda_source._driver()
