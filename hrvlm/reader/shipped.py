"""Where the model that comes with the package is: one that reads drawn text."""

from __future__ import annotations

from importlib.resources import files

PROMPT = "Read."  # what it was trained to be asked
# The mean log-probability by token of an answer to believe: benchmarks/reading_doubts.py.
DOUBT_BELOW = -0.2
WHAT_IT_READS = (
    "the reader of hrvlm, 4.3 million parameters: it reads printed, level English text, best short "
    "lines of 14 to 32 px, and small receipts, forms and panels; not pages, photographs or "
    "handwriting, and whatever the prompt, it answers no questions"
)


def reader_path() -> str:
    """Its directory, as ``from_pretrained`` takes it.

    Raises:
        FileNotFoundError: the package was built without its data.
    """
    directory = files("hrvlm").joinpath("assets", "reader")
    if not directory.joinpath("model.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory}: the reader's weights are not there; reinstall hrvlm, or train them with "
            "hrvlm train recipes/reader.yaml"
        )
    return str(directory)
