"""Where the model that comes with the package is: one that reads drawn text."""

from __future__ import annotations

from importlib.resources import files

PROMPT = "Read."  # what it was trained to be asked


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
