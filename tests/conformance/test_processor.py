"""VLMProcessor under transformers' tests of processors."""

import unittest

from hrvlm.images.transformers_processor import VLMImageProcessor
from hrvlm.vlm.processors import VLMProcessor
from tests.conformance import suite
from tests.tiny import tokenizer_of

common = suite.module("test_processing_common")
# Theirs is -1, which is refused here.
common.MODALITY_TEST_SPECS["images"]["init_time_kwargs"]["rescale_factor"] = 1e-9


class VLMProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLMProcessor
    # A byte is a token here.
    images_text_kwargs_max_length, images_text_kwargs_override_max_length = 400, 390
    images_unstructured_max_length = 380
    chat_template_max_length = 300

    @classmethod
    def _setup_image_processor(cls):
        return VLMImageProcessor(patch_size=8, pixel_shuffle_factor=2, max_img_size=64)

    @classmethod
    def _setup_tokenizer(cls):
        return tokenizer_of()
