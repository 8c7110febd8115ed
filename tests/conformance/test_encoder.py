"""DINOv3Encoder under transformers' tests of models."""

import unittest

from transformers import DINOv3ViTConfig

from hrvlm import DINOv3Encoder
from tests.conformance import suite
from tests.conformance.testers import EncoderTester, LoadsNothing

modeling = suite.module("test_modeling_common")
configuration = suite.module("test_configuration_common")


class DINOv3EncoderTest(LoadsNothing, modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DINOv3Encoder,)
    test_resize_embeddings = False
    has_attentions = False  # no kernel makes a matrix of them

    def setUp(self):
        self.model_tester = EncoderTester(self)
        self.config_tester = configuration.ConfigTester(
            self, config_class=DINOv3ViTConfig, has_text_modality=False, hidden_size=37
        )

    def test_config(self):
        self.config_tester.run_common_tests()
