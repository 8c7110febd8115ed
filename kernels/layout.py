"""Lay the kernel package out as a Hugging Face Hub kernel.

    python kernels/layout.py OUT_DIR [--overwrite]

    OUT_DIR/build.toml                  what kernel-builder needs to build it again,
    OUT_DIR/torch-ext/hrvlm_kernels/    and from what
    OUT_DIR/build/torch-<backend>/      the build of each backend: the package's files and
                                        metadata.json, as `kernels` loads them

The package is Python and Triton alone, so all builds hold the same files. What differs is the id in
metadata.json, `_hrvlm_kernels_<backend>_<hash of the files>`: `kernels` imports a build under its
id, and hrvlm_kernels/ops_namespace.py makes it the namespace of the build's torch ops.

    module = kernels.get_local_kernel(Path("OUT_DIR"))
    kernel-builder upload OUT_DIR --repo-id ...
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # `kernels` needs it there too

SOURCE = Path(__file__).resolve().parent


def lay_out(out: Path, *, overwrite: bool = False) -> None:
    """Write the layout to `out`, all of it or nothing.

    Args:
        out: A path where there is nothing yet.
        overwrite: Replace a layout that is already there.

    Raises:
        FileExistsError: there is something at `out`, and `overwrite` is off or it is no layout.
        FileNotFoundError: the folder that `out` lies in does not exist.
    """
    out = out.resolve()
    _check_target(out, overwrite)
    config = tomllib.loads((SOURCE / "build.toml").read_text())["general"]
    module = config["name"].replace("-", "_")
    files = {
        path.relative_to(SOURCE / module).as_posix(): path.read_bytes()
        for path in sorted((SOURCE / module).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Beside `out`, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workspace:
        new = Path(workspace) / "new"
        _write(new / "torch-ext" / module, files)
        shutil.copyfile(SOURCE / "build.toml", new / "build.toml")
        for backend in config["backends"]:
            metadata = json.dumps(_metadata(config, backend, files), indent=2) + "\n"
            build = files | {"metadata.json": metadata.encode()}
            _write(new / "build" / f"torch-{backend}", build)
        _replace(out, new, Path(workspace) / "old")


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a folder")
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it")
    if not (out / "build.toml").is_file() or not (out / "build").is_dir():
        raise FileExistsError(f"{out} is not a layout of this script and will not be replaced")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _metadata(config: dict[str, Any], backend: str, files: dict[str, bytes]) -> dict[str, Any]:
    """What `kernels` reads to choose, check and import a build."""
    module = config["name"].replace("-", "_")
    digests = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    unique = hashlib.sha256(json.dumps({n: d.hex() for n, d in digests.items()}).encode())
    return {
        "name": config["name"],
        "id": f"_{module}_{backend}_{unique.hexdigest()[:8]}",
        "version": config["version"],
        "license": config["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(d).decode() for name, d in digests.items()},
        },
    }


def _replace(out: Path, new: Path, old: Path) -> None:
    replaces = out.exists()
    if replaces:
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if replaces:
            old.rename(out)
        raise


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Lay the kernel package out as a Hugging Face Hub kernel."
    )
    parser.add_argument("out", metavar="OUT_DIR", type=Path, help="the folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier layout")
    arguments = parser.parse_args()
    try:
        lay_out(arguments.out, overwrite=arguments.overwrite)
    except (FileExistsError, FileNotFoundError) as error:
        parser.exit(1, f"layout.py: {error}\n")


if __name__ == "__main__":
    main()
