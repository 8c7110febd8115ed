"""A libcuda.so.1 that does nothing under Triton's real launcher, for CPU tensors.

    driver = null_driver.install()          # kernels compile for sm_90, and their launchers run
    kernel[grid](...)                       # all of the host's work of a launch; nothing executes
    driver.launches(), driver.tensor_maps()

What it shows: that launchers build and take our arguments, and that every TMA descriptor passes the
documented checks of cuTensorMapEncodeTiled. With it the host's time of an op can be compared with
another's in one run; it is a time of Python and C on this CPU, and nothing of a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("null_driver.c")


class NullDriver:
    """Triton's NVIDIA driver over the null library."""

    def __init__(self, library: ctypes.CDLL, folder: tempfile.TemporaryDirectory[str]) -> None:
        import triton
        from triton.backends.nvidia import driver as nvidia

        self.library, self.folder = library, folder
        try:
            self.utils = nvidia.CudaUtils()
        except ImportError as error:
            raise RuntimeError(
                f"Triton {triton.__version__} asks libcuda for what the null driver does not have: "
                f"{error}"
            ) from error
        self.launcher_cls = nvidia.CudaLauncher

    @staticmethod
    def is_active() -> bool:
        """Whether Triton may choose it by itself: only :func:`install` does."""
        return False

    def launches(self) -> int:
        """Kernels that were launched so far."""
        return ctypes.c_ulong.in_dll(self.library, "null_driver_launches").value

    def tensor_maps(self) -> int:
        """TMA descriptors that were encoded so far."""
        return ctypes.c_ulong.in_dll(self.library, "null_driver_tensor_maps").value

    def get_current_target(self) -> Any:
        """sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """The CPU: its tensors are taken."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """0, the only one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """(9, 0)."""
        return (9, 0)

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Of a kernel's argument."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


def install() -> NullDriver:
    """Build the library, load it, and make this Triton's driver in this process.

    Raises:
        RuntimeError: there is no C compiler, or it refuses the source; or this release of Triton
            asks libcuda for more than is there.
    """
    import triton
    from triton import knobs

    folder = tempfile.TemporaryDirectory(prefix="null_driver_")  # launchers are linked with it
    library = _build(Path(folder.name))
    # By its soname it stands for the real one in what Triton builds and loads after it.
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = folder.name
    driver = NullDriver(loaded, folder)
    triton.runtime.driver.set_active(driver)
    return driver


def _build(folder: Path) -> Path:
    import triton

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the null CUDA driver needs a C compiler")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{headers}",
         str(_SOURCE), "-o", str(library)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{compiler} refuses {_SOURCE.name}:\n{done.stderr}")
    return library
