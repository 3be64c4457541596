"""What every test shares: the real images, poisoned memory, and what is skipped where."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ddrf_fast
from ddrf_fast.ops import _native


def pytest_configure() -> None:
    # What a shell starts in the background ignores it, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine; `make gpu` runs it where there is one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real image pairs, `DDRF_FAST_DATA`."""
    value = os.environ.get("DDRF_FAST_DATA")
    if not value:
        pytest.skip("DDRF_FAST_DATA is not set: no real image pairs on this machine")
    path = Path(value)
    if not path.is_dir():
        pytest.skip(f"DDRF_FAST_DATA={value} is not a folder")
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a small network, untrained."""
    # Here, because the tests of the operations need nothing but torch.
    from ddrf_fast.models import DDRFNet, DDRFNetConfig, save_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DDRFNet(DDRFNetConfig(width=8, blocks=1, num_kernels=2))
    return save_model(model, tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(params=["reference", "native"])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once in plain torch and once on the compiled CPU kernels."""
    if request.param == "native" and not _native.status()["_C"][0]:
        pytest.skip(_native.status()["_C"][1])
    with ddrf_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Fills uninitialised tensors with NaN (or the largest integer), so that reading one shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
