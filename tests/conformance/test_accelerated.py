"""transformers' own DINOv3, accelerated as it is made, under transformers' tests."""

import unittest

from transformers import DINOv3ViTBackbone, DINOv3ViTConfig, DINOv3ViTModel

import hrvlm
from tests.conformance import suite
from tests.conformance.testers import EncoderTester

modeling = suite.module("test_modeling_common")
backbones = suite.module("test_backbone_common")


class AcceleratedModel(DINOv3ViTModel):
    __module__ = DINOv3ViTModel.__module__  # other modules' classes have no names in files

    def __init__(self, config):
        super().__init__(config)
        hrvlm.accelerate(self)


class AcceleratedBackbone(DINOv3ViTBackbone):
    def __init__(self, config):
        super().__init__(config)
        hrvlm.accelerate(self)


class AcceleratedModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (AcceleratedModel,)
    test_resize_embeddings = False
    has_attentions = False  # no kernel makes a matrix of them

    def setUp(self):
        self.model_tester = EncoderTester(self)


class AcceleratedBackboneTest(backbones.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (AcceleratedBackbone,)
    config_class = DINOv3ViTConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = EncoderTester(self, out_features=["stage1", "stage2"])
