"""Saved models in transformers' pipelines, under its mixin; see `pipelines.py`."""

import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path

from transformers import DINOv3ViTImageProcessor, DINOv3ViTModel
from transformers.models.auto import processing_auto

import hrvlm
from hrvlm import DINOv3Encoder, VisionLanguageModel
from tests.conformance import suite
from tests.tiny import model_of, processor_of, vision_config_of

# The mixin reads the list of its models when it is imported, and the models when a test runs.
MODELS = Path(tempfile.mkdtemp())
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(MODELS)
VLM = {
    "tokenizer_classes": ["PreTrainedTokenizerFast"],
    "processor_classes": ["AutoImageProcessor"],
}
ENCODER = {"tokenizer_classes": [], "processor_classes": ["DINOv3ViTImageProcessor"]}


class AcceleratedModel(DINOv3ViTModel):
    def __init__(self, config):
        super().__init__(config)
        hrvlm.accelerate(self)


KINDS = {"VisionLanguageModel": VLM, "DINOv3Encoder": ENCODER, "AcceleratedModel": ENCODER}
(MODELS / "reports").mkdir()
(MODELS / "reports" / "tiny_model_summary.json").write_text(json.dumps(KINDS))
mixin = suite.module("test_pipeline_mixin")
processing_auto.PROCESSOR_MAPPING_NAMES["hrvlm"] = "AutoProcessor"


class _Pipelines(mixin.PipelineTesterMixin):
    @classmethod
    def setUpClass(cls):
        ((_, kind),) = {(m.config_class.model_type, m) for m in cls.pipeline_model_mapping.values()}
        cls.folder = MODELS / kind.config_class.model_type / kind.__name__
        if kind is VisionLanguageModel:
            model_of().save_pretrained(cls.folder)
            processor_of().save_pretrained(cls.folder)
        else:
            kind(vision_config_of()).save_pretrained(cls.folder)
            size = {"height": 32, "width": 32}
            DINOv3ViTImageProcessor(size=size).save_pretrained(cls.folder)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)


class VLMPipelineTest(_Pipelines, unittest.TestCase):
    pipeline_model_mapping = {
        "image-text-to-text": VisionLanguageModel,
        "any-to-any": VisionLanguageModel,
    }


class EncoderPipelineTest(_Pipelines, unittest.TestCase):
    pipeline_model_mapping = {"image-feature-extraction": DINOv3Encoder}


class AcceleratedPipelineTest(_Pipelines, unittest.TestCase):
    pipeline_model_mapping = {"image-feature-extraction": AcceleratedModel}
