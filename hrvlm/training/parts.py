"""The parts of a model that training tells apart, and the modules they are."""

MODULES = {"vision": "vision_encoder", "projector": "MP", "language": "decoder"}
PARTS = tuple(MODULES)
