"""DINOv2Encoder under transformers' tests of models."""

import unittest

from transformers import Dinov2WithRegistersConfig

from hrvlm import DINOv2Encoder
from tests.conformance import suite
from tests.conformance.testers import EncoderTester, LoadsNothing

modeling = suite.module("test_modeling_common")


class DINOv2EncoderTest(LoadsNothing, modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DINOv2Encoder,)
    test_resize_embeddings = False
    has_attentions = False  # no kernel makes a matrix of them

    def setUp(self):
        # Gated, so that its weights take every conversion on their way to a file and back.
        self.model_tester = EncoderTester(self, Dinov2WithRegistersConfig, use_swiglu_ffn=True)
