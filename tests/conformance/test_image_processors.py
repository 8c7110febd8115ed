"""Both image processors under transformers' tests of image processors, and against each other."""

import unittest

from hrvlm.images.transformers_processor import VLMImageProcessor, VLMImageProcessorPil
from tests.conformance import suite

common = suite.module("test_image_processing_common")
CLASSES = {"torchvision": VLMImageProcessor, "pil": VLMImageProcessorPil}
OPTIONS = {
    "patch_size": 8,
    "pixel_shuffle_factor": 2,
    "max_img_size": 128,
    "do_resize": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


class Tester:
    batch_size, num_channels = 3, 3
    min_resolution, max_resolution = 30, 200
    image_processing_classes = CLASSES

    def prepare_image_inputs(self, **options):
        own = ("batch_size", "num_channels", "min_resolution", "max_resolution")
        return common.prepare_image_inputs(**({k: getattr(self, k) for k in own} | options))

    def prepare_processor_inputs(self, **options):
        return {"images": self.prepare_image_inputs(**options)}

    def prepare_image_processor_dict(self):
        return dict(OPTIONS)


class VLMImageProcessorTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = CLASSES
    image_processor_dict = OPTIONS

    def setUp(self):
        self.image_processor_tester = Tester()

    # Theirs ask for [B, 3, H, W]; these, as in the tests of Qwen2-VL, for packed patches.

    def check_call(self, **kind):
        images = self.image_processor_tester.prepare_image_inputs(**kind)
        for image_processing_class in CLASSES.values():
            processor = image_processing_class(**OPTIONS)
            for batch in (images[0], images):
                out = processor(batch, return_tensors="pt")
                rows = out.image_grid_hw.prod(1).sum()
                assert out.pixel_values.shape == (rows, 3 * 8 * 8)
                assert len(out.image_grid_hw) == (len(images) if batch is images else 1)

    def test_call_pil(self):
        self.check_call()

    def test_call_numpy(self):
        self.check_call(numpify=True)

    def test_call_pytorch(self):
        self.check_call(torchify=True)
