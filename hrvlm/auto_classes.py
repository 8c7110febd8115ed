"""Makes transformers' Auto classes know our classes, without importing any of them early.

`AutoConfig.register` and its siblings take classes, and importing ours means importing torch,
torchvision and Triton, which `import hrvlm` must not do. So `install` only watches for the modules
of transformers that hold the registries, and registers when one of them is imported (or at once, if
it already is). The models need no registry to be watched: AutoModel looks a class up for a config,
and the first `VLMConfig` that is made calls `register_models`. Importing models while transformers
is halfway through its own imports would run in circles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def install() -> None:
    """Register now what can be, and the rest when transformers imports its registries."""
    for registry, register in _REGISTRIES.items():
        if registry in sys.modules:
            register()
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def register_models() -> None:
    """AutoModel and AutoModelForImageTextToText."""
    import_module("hrvlm.vlm.vision_language_model")  # registers itself at its end


def register_config() -> None:
    """AutoConfig."""
    import_module("hrvlm.vlm.config")  # registers itself at its end


def register_image_processors() -> None:
    """AutoImageProcessor, for both backends."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
    from .vlm.config import VLMConfig

    AutoImageProcessor.register(
        VLMConfig,
        image_processor_classes={"torchvision": VLMImageProcessor, "pil": VLMImageProcessorPil},
        exist_ok=True,
    )


def register_processor() -> None:
    """AutoProcessor."""
    import_module("hrvlm.vlm.processors")  # registers itself at its end


_AUTO = "transformers.models.auto"
_REGISTRIES: dict[str, Callable[[], None]] = {
    f"{_AUTO}.configuration_auto": register_config,
    f"{_AUTO}.image_processing_auto": register_image_processors,
    f"{_AUTO}.processing_auto": register_processor,
}


class _RegistryFinder(MetaPathFinder):
    """Finds nothing by itself: it adds our registration to the loading of the registries."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _REGISTRIES[fullname])
        return spec


class _RegisteringLoader(Loader):
    """The module's own loader, followed by our registration."""

    def __init__(self, loader: Loader, register: Callable[[], None]):
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._register()
