"""Makes transformers' Auto classes know our classes, without importing any of them early.

`AutoConfig.register` and its siblings take classes, and importing ours means importing torch,
torchvision and Triton, which `import hrvlm` must not do. So `install` only watches for the modules
of transformers that hold the registries, and for ours that hold the classes: what belongs together
is registered when the last of it is imported (or at once, if all of it is). A model is registered
by a stand-in, which imports the class when transformers asks it for something: importing models
while transformers is halfway through its own imports would run in circles, and making a config
needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NamedTuple

_CONFIG = "hrvlm.vlm.config"
_MODEL = "hrvlm.vlm.vision_language_model"
_PROCESSOR = "hrvlm.vlm.processors"
_BACKBONE_CONFIG = "hrvlm.encoder.backbone_config"
_BACKBONE = "hrvlm.encoder.backbone"
_IMAGES = "hrvlm.images.transformers_processor"


def install() -> None:
    """Register now what can be, and the rest when it is imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for registration in _REGISTRATIONS:
        _register_if_ready(registration)


def register_config() -> None:
    """AutoConfig."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from .vlm.config import VLMConfig

    AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)


def register_model() -> None:
    """The Auto classes of models that see and write, by the class itself once it is imported."""
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    from .vlm.config import VLMConfig

    model: Any = LateClass(_MODEL, "VisionLanguageModel", VLMConfig)
    if _imported(_MODEL):
        model = model.load()
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(VLMConfig, model, exist_ok=True)


def register_backbone_config() -> None:
    """AutoConfig, for the backbone's: by a stand-in, since its base is a config of transformers.

    To import that here could be to import it twice: transformers' configs import this registry.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: Any = LateClass(_BACKBONE_CONFIG, "DINOv3BackboneConfig")
    if _imported(_BACKBONE_CONFIG):
        config = config.load()
    CONFIG_MAPPING.register("hrvlm_dinov3", config, exist_ok=True)


def register_backbone() -> None:
    """AutoBackbone, once there is a config to know it by."""
    if not _imported(_BACKBONE_CONFIG):
        return
    from transformers.models.auto.modeling_auto import AutoBackbone

    from .encoder.backbone_config import DINOv3BackboneConfig

    backbone: Any = LateClass(_BACKBONE, "DINOv3Backbone", DINOv3BackboneConfig)
    if _imported(_BACKBONE):
        backbone = backbone.load()
    AutoBackbone.register(DINOv3BackboneConfig, backbone, exist_ok=True)


def _imported(module: str) -> bool:
    """Whether all of it is."""
    return module in sys.modules and module not in _Loader.running


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
    from transformers.models.auto.processing_auto import AutoProcessor

    from .vlm.config import VLMConfig
    from .vlm.processors import VLMProcessor

    AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)


class _Registration(NamedTuple):
    """Classes that a registry has to know.

    Attributes:
        registry: The module of transformers that holds it.
        needed: Our modules that `register` imports.
        register: Does it; may be called again.
        late: A module of ours after whose import it is called again.
    """

    registry: str
    needed: tuple[str, ...]
    register: Callable[[], None]
    late: str | None = None


_AUTO = "transformers.models.auto"
_REGISTRATIONS = (
    _Registration(f"{_AUTO}.configuration_auto", (_CONFIG,), register_config),
    _Registration(f"{_AUTO}.modeling_auto", (_CONFIG,), register_model, late=_MODEL),
    _Registration(
        f"{_AUTO}.configuration_auto", (), register_backbone_config, late=_BACKBONE_CONFIG
    ),
    _Registration(f"{_AUTO}.modeling_auto", (_BACKBONE_CONFIG,), register_backbone, late=_BACKBONE),
    _Registration(f"{_AUTO}.image_processing_auto", (_CONFIG, _IMAGES), register_image_processors),
    _Registration(f"{_AUTO}.processing_auto", (_CONFIG, _PROCESSOR), register_processor),
)


def _register_if_ready(registration: _Registration) -> None:
    """Register unless something of it is yet to be imported by someone else, or half imported."""
    unfinished = _Loader.running.intersection({registration.registry, *registration.needed})
    if registration.registry in sys.modules and not unfinished:
        registration.register()


class LateClass:
    """A class that is imported when something of it is asked for.

    Attributes:
        config_class: As of a model's class; transformers looks at it when it registers one.
    """

    def __init__(self, module: str, name: str, config_class: type | None = None):
        self._module = module
        self.__name__ = name
        if config_class is not None:
            self.config_class = config_class

    def load(self) -> Any:
        """The class itself."""
        return getattr(import_module(self._module), self.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance."""
        return self.load()(*args, **kwargs)


class _Finder(MetaPathFinder):
    """Finds nothing by itself: it adds our registration to the loading of a module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        concerned = [r for r in _REGISTRATIONS if fullname in (r.registry, *r.needed, r.late)]
        if not concerned:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, concerned)
        return spec


class _Loader(Loader):
    """The module's own loader, followed by our registration."""

    running: set[str] = set()  # modules that are being loaded this way

    def __init__(self, loader: Loader, concerned: Sequence[_Registration]):
        self._loader = loader
        self._concerned = concerned

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self.running.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self.running.discard(module.__name__)
        for registration in self._concerned:
            _register_if_ready(registration)
