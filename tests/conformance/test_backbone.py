"""DINOv3Backbone under transformers' tests of backbones and of models."""

import unittest

from hrvlm import DINOv3Backbone
from hrvlm.encoder.backbone_config import DINOv3BackboneConfig
from tests.conformance import suite
from tests.conformance.testers import EncoderTester, LoadsNothing

modeling = suite.module("test_modeling_common")
backbones = suite.module("test_backbone_common")


def tester(parent):
    return EncoderTester(parent, DINOv3BackboneConfig, out_features=["stage1", "stage2"])


class DINOv3BackboneTest(backbones.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (DINOv3Backbone,)
    config_class = DINOv3BackboneConfig
    has_attentions = False  # no kernel makes a matrix of them

    def setUp(self):
        self.model_tester = tester(self)


class DINOv3BackboneModelTest(LoadsNothing, modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DINOv3Backbone,)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = tester(self)
