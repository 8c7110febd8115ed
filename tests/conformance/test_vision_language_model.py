"""VisionLanguageModel under transformers' tests of models and of training."""

import unittest

from hrvlm import VisionLanguageModel, VLMConfig
from tests.conformance import suite
from tests.conformance.testers import LoadsNothing, VLMTester

modeling = suite.module("test_modeling_common")
configuration = suite.module("test_configuration_common")
training = suite.module("test_training_mixin")

# By these names the mixins know whose forward takes labels.
modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "hrvlm": "VisionLanguageModel",
}


class _Common(
    LoadsNothing,
    modeling.ModelTesterMixin,
    suite.GenerationTesterMixin,
    training.TrainingTesterMixin,
):
    all_model_classes = (VisionLanguageModel,)
    _is_composite = True
    # Features of images are packed; Qwen2-VL's tests set it too.
    skip_test_image_features_output_shape = True
    model_tester = None
    options = {}
    # The test unfreezes the mask token, which no image uses; texts alone use no encoder.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = VLMTester(self, **self.options)

    def test_capture_outputs_decorator(self):
        """Asks for attention weights, which only eager attention computes."""
        config = self.model_tester.get_config()
        config._attn_implementation = "eager"
        self.model_tester.get_config = lambda: config
        super().test_capture_outputs_decorator()

    def test_training_overfit(self):
        """Asks a config for a vocabulary, which is its text_config's."""
        config = self.model_tester.get_config()
        config.vocab_size = config.text_config.vocab_size
        self.model_tester.get_config = lambda: config
        super().test_training_overfit()


class VisionLanguageModelTest(_Common, unittest.TestCase):
    has_attentions = False  # no kernel makes a matrix of the encoder's

    def test_config(self):
        configuration.ConfigTester(
            self, config_class=VLMConfig, has_text_modality=False
        ).run_common_tests()


class TextOnlyVisionLanguageModelTest(_Common, unittest.TestCase):
    """Texts without an image: what concerns the language model's attention."""

    options = {"images": False}


class TiedVisionLanguageModelTest(_Common, unittest.TestCase):
    has_attentions = False
    options = {"tied": True}


class SiglipVisionLanguageModelTest(_Common, unittest.TestCase):
    options = {"vision": "siglip"}
