"""Where the two packages lie in this tree; everything else is in pyproject.toml.

``kernels/`` is a source root without an ``__init__.py``: a top-level package of that name belongs
to another library, one that transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["hrvlm", "hrvlm.*"]),
        *find_packages("kernels", include=["hrvlm_kernels", "hrvlm_kernels.*"]),
    ],
    package_dir={"hrvlm": "hrvlm", "hrvlm_kernels": "kernels/hrvlm_kernels"},
)
