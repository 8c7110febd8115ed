"""Disks that are full."""

import contextlib
import resource
import subprocess

FILLED = ".filled"


@contextlib.contextmanager
def small_file_system(folder, size):
    """`folder` as a file system of `size` bytes; PermissionError where none may be mounted."""
    options = ["-t", "tmpfs", "-o", f"size={max(size, 4096)}", "none", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        raise PermissionError("no file system may be mounted here")
    try:
        if size < 4096:  # a page is the least that it has
            (folder / FILLED).write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_files(folder, size):
    """No file grows beyond `size` bytes, as where a quota is used up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL_DISKS = {"file system": small_file_system, "file size": small_files}
