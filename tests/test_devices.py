"""Which worker computes where, with how many threads."""

import os
import subprocess
import sys

import pytest

from sfl.env import SimEnv
from sfl.errors import ConfigError
from sfl.train import devices
from sfl.train.devices import count_gpus, plan_workers, thread_environment

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("workers", "clients", "device", "gpus", "cores", "planned"),
    [
        (1, 4, "auto", 0, 8, ["cpu"]),
        (3, 8, "auto", 0, 8, ["cpu"] * 3),
        (0, 8, "auto", 0, 4, ["cpu"] * 4),
        (0, 3, "auto", 0, 8, ["cpu"] * 3),
        (9, 3, "cpu", 2, 8, ["cpu"] * 3),
        (1, 4, "auto", 2, 8, ["cuda:0"]),
        (0, 4, "auto", 2, 8, ["cuda:0", "cuda:1"]),
        (8, 4, "cuda", 2, 8, ["cuda:0", "cuda:1"]),
        (0, 1, "cuda", 2, 8, ["cuda:0"]),
        (4, 4, "cuda:1", 2, 8, ["cuda:1"]),
        (2, 4, "cpu", 2, 8, ["cpu"] * 2),
        (4, 4, "mps", 0, 8, ["mps"]),
    ],
)
def test_the_plan(workers: int, clients: int, device: str, gpus: int, cores: int, planned: list[str]) -> None:
    assert plan_workers(workers, clients, device, gpus, cores) == planned


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:2"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    gpus = 2 if device == "cuda:2" else 0
    with pytest.raises(ConfigError, match=f"one that is there, got '{device}' with {gpus} GPUs. Use --device cpu"):
        plan_workers(1, 1, device, gpus, 1)


@pytest.mark.parametrize("device", ["gpu", "", "cpu:0", "cuda:one", "cuda:-1", "cuda:²", "tpu"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda, cuda:N or mps"):
        plan_workers(1, 1, device, 4, 1)


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with thread_environment(3):
        assert [os.environ[name] for name in NAMES] == ["3", "3", "PASSIVE"]
    assert dict(os.environ) == before
    with pytest.raises(KeyError), thread_environment(3):
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.skipif(
    sys.platform != "linux" or any(os.path.exists(f"/dev/{n}") for n in ("nvidia0", "kfd", "dxg")),  # noqa: PTH110
    reason="needs a Linux machine without a GPU",
)
def test_a_machine_without_a_gpu_never_loads_torch() -> None:
    code = (
        "import sys; from sfl.train.devices import count_gpus; n = count_gpus(); sys.exit(n or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_a_gpu_shows_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(devices, "_GPU_NODES", ("null",))
    there = SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=there))
    assert count_gpus() == 3
    gone = SimpleNamespace(is_available=lambda: False, device_count=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gone))
    assert count_gpus() == 0
    monkeypatch.setitem(sys.modules, "torch", None)
    assert count_gpus() == 0


@pytest.mark.parametrize(("name", "value"), [("num_clients", 0), ("num_clients", -2), ("num_threads", -1)])
def test_an_environment_checks_its_numbers(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        SimEnv(**{name: value})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True}, False),  # emulated: five times slower than float32
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_bfloat16_is_used_where_the_processor_computes_it(
    found: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from sfl.train.trainer import has_bf16

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert has_bf16(torch.device("cpu")) is expected
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not has_bf16(torch.device("cpu"))
