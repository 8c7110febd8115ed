"""What transformers' tests/pipelines, which are not in its source distribution, ask of two tasks.

The mixin loads a model and its processors and hands them to ``get_test_pipeline``; the examples it
then also runs in batches.
"""

from transformers import pipeline

from tests.tiny import picture

CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(40, 24)},
            {"type": "text", "text": "What?"},
        ],
    }
]


class ImageTextToTextPipelineTests:
    """Answers to chats with images; any-to-any is the same pipeline."""

    task = "image-text-to-text"

    def get_test_pipeline(self, model, tokenizer, processor, image_processor=None, dtype="float32"):
        made = pipeline(self.task, model=model, processor=processor, dtype=dtype)
        prompt = f"{processor.image_token} What?"
        examples = [{"images": picture(40, 24), "text": prompt}] * 2
        return made, examples

    def run_pipeline_test(self, made, examples):
        (answer,) = made(images=examples[0]["images"], text=examples[0]["text"], max_new_tokens=3)
        assert answer["input_text"] == examples[0]["text"] and answer["generated_text"]
        (answer,) = made(text=CHAT, max_new_tokens=3)
        assert [turn["role"] for turn in answer["generated_text"]] == ["user", "assistant"]
        both = made(text=[CHAT, CHAT], max_new_tokens=3, return_full_text=False)
        assert both[0] == both[1] and isinstance(both[0][0]["generated_text"], str)
        assert made(text="hello", max_new_tokens=3)


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    task = "any-to-any"


class ImageFeatureExtractionPipelineTests:
    def get_test_pipeline(self, model, tokenizer, image_processor, processor=None, dtype="float32"):
        made = pipeline(
            "image-feature-extraction", model=model, image_processor=image_processor, dtype=dtype
        )
        return made, [picture(40, 24), picture(40, 24)]

    def run_pipeline_test(self, made, examples):
        one = made(examples[0])
        assert made(examples) == [one, one] and len(one[0][0]) == made.model.config.hidden_size
        pooled = made(examples[0], pool=True)
        assert len(pooled[0]) == made.model.config.hidden_size


TESTS = {
    "test_pipelines_any_to_any": {"AnyToAnyPipelineTests": AnyToAnyPipelineTests},
    "test_pipelines_image_text_to_text": {
        "ImageTextToTextPipelineTests": ImageTextToTextPipelineTests
    },
    "test_pipelines_image_feature_extraction": {
        "ImageFeatureExtractionPipelineTests": ImageFeatureExtractionPipelineTests
    },
}
