"""What `micro doctor` says of CUDA: the build, the driver, the devices, and whether they fit."""

import pytest

import micro
from micro import _native, cuda
from micro.cli import doctor

DEVICES = [("A100", (8, 0)), ("H100", (9, 0))]


class Driver:
    """Answers as libcuda does: a status, and results through pointers."""

    def __init__(self, devices, init=0):
        self.devices, self.init = devices, init

    def cuDriverGetVersion(self, number):
        number._obj.value = 13010
        return 0

    def cuInit(self, flags):
        return self.init

    def cuDeviceGetCount(self, number):
        number._obj.value = len(self.devices)
        return 0

    def cuDeviceGetName(self, name, size, index):
        name.value = self.devices[index][0].encode()
        return 0

    def cuDeviceGetAttribute(self, number, attribute, index):
        number._obj.value = self.devices[index][1][{75: 0, 76: 1}[attribute]]
        return 0


@pytest.fixture
def found(monkeypatch):
    def examine(driver):
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
        return cuda.examine()

    return examine


def test_devices_are_named_with_their_architecture(found):
    assert found(Driver(DEVICES)) == {
        "driver": "13.1",
        "devices": [{"name": "A100", "arch": "sm_80"}, {"name": "H100", "arch": "sm_90"}],
        "why_none": None,
    }


def test_why_there_is_no_device(found):
    assert cuda.examine("libnosuchlibrary.so.1")["why_none"] == "no driver (libnosuchlibrary.so.1 was not found)"
    assert found(Driver([]))["why_none"] == "the driver sees no device"
    assert found(Driver(DEVICES, init=100)) == {
        "driver": "13.1",
        "devices": [],
        "why_none": "the driver's cuInit failed with error 100",
    }


@pytest.mark.parametrize(
    "arch, built, code",
    [
        ("sm_80", ["sm_80", "compute_80"], "sm_80"),
        ("sm_86", ["sm_80", "sm_90", "compute_80"], "sm_80"),
        ("sm_89", ["sm_80", "sm_89", "sm_90"], "sm_89"),
        ("sm_90", ["sm_80", "compute_80"], "compute_80"),
        ("sm_120", ["sm_90", "sm_100", "compute_80"], "compute_80"),
        ("sm_90", ["sm_90a", "sm_80"], "sm_90a"),
        ("sm_100", ["sm_90a", "sm_80"], None),
        ("sm_75", ["sm_80", "compute_80"], None),
        ("sm_80", [], None),
    ],
)
def test_the_code_that_a_device_runs(arch, built, code):
    assert cuda.code_for(arch, built) == code


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="no CUDA architecture"):
        cuda.code_for("gfx90", ["sm_80"])


CORE = {"cuda": "nvcc 13.0.88", "cuda_archs": ["sm_80", "compute_80"]}
TORCH = {"torch": "2.13.0+cpu", "cuda": False}
H100 = {"driver": "13.1", "devices": [{"name": "H100", "arch": "sm_90"}], "why_none": None}


def test_the_report_says_what_was_built_and_what_runs():
    lines = doctor._cuda_lines(CORE, TORCH | {"cuda": True}, H100)
    assert lines == [
        "CUDA       kernels for sm_80, compute_80 (nvcc 13.0.88)",
        "device     H100 (sm_90), driver for CUDA 13.1: runs the compute_80 kernels",
    ]


def test_the_report_says_why_nothing_runs():
    nothing = {"driver": None, "devices": [], "why_none": "no driver (x was not found)"}
    assert doctor._cuda_lines({"cuda": "nvcc was not found", "cuda_archs": []}, TORCH, nothing) == [
        "CUDA       kernels off (nvcc was not found)",
        "devices    none: no driver (x was not found)",
    ]
    old = {"driver": "12.0", "devices": [{"name": "T4", "arch": "sm_75"}], "why_none": None}
    lines = doctor._cuda_lines(CORE, TORCH, old)
    assert lines[1].endswith("no kernel of this build fits")
    assert "torch 2.13.0+cpu cannot use it" in lines[2]


def test_the_path_of_an_operator_on_cuda():
    def path(operator, **info):
        return _native._cuda_path(
            operator, {"plan": [], "expert_linear": [], "rope": []}, ["plan", "expert_linear"], info
        )

    built = {"cuda": "nvcc 13.0.88", "cuda_archs": ["sm_80", "compute_80"]}
    assert path("plan", **built) == "micro kernel (sm_80, compute_80)"
    assert path("stacked_linear", **built) == "micro kernel (sm_80, compute_80)"
    assert path("rope", **built) == "none (no kernel)"
    assert path("rope_frequencies", **built) == "torch functions"
    assert path("plan", cuda="MICRO_CUDA=OFF", cuda_archs=[]) == "none (MICRO_CUDA=OFF)"


def test_the_library_holds_the_machine_code_that_it_claims():
    info = micro.build_info()
    holds_code = b".nv_fatbin" in _native.LIBRARY.read_bytes()
    assert holds_code == bool(info["cuda_archs"])
    paths = {path["cuda"] for path in info["ops"].values()}
    assert any(path.startswith("micro kernel (") for path in paths) == bool(info["cuda_archs"])
