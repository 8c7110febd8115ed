"""VisionLanguageModel under transformers' tests of models and of training."""

import unittest

from hrvlm import VisionLanguageModel, VLMConfig
from tests.conformance import suite
from tests.conformance.testers import LoadsNothing, VLMTester

modeling = suite.module("test_modeling_common")
configuration = suite.module("test_configuration_common")
training = suite.module("test_training_mixin")


class _Common(
    LoadsNothing,
    modeling.ModelTesterMixin,
    suite.GenerationTesterMixin,
    training.TrainingTesterMixin,
):
    all_model_classes = (VisionLanguageModel,)
    _is_composite = True
    model_tester = None
    options = {}

    def setUp(self):
        self.model_tester = VLMTester(self, **self.options)


class VisionLanguageModelTest(_Common, unittest.TestCase):
    def test_config(self):
        configuration.ConfigTester(
            self, config_class=VLMConfig, has_text_modality=False
        ).run_common_tests()


class TextOnlyVisionLanguageModelTest(_Common, unittest.TestCase):
    """Texts without an image."""

    options = {"images": False}


class TiedVisionLanguageModelTest(_Common, unittest.TestCase):
    options = {"tied": True}


class SiglipVisionLanguageModelTest(_Common, unittest.TestCase):
    options = {"vision": "siglip"}
