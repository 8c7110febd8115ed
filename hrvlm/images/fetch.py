"""Images that come as text: URLs, data URIs, base64."""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..machine import first_line
from .formats import ImageError

MAX_BYTES = 64_000_000  # of a file that is fetched or written as text
SECONDS = 60  # to fetch one


def is_url(source: str) -> bool:
    """Whether it is an address in the network."""
    return source[:8].lower().startswith(("http://", "https://"))


def is_data_uri(source: str) -> bool:
    """Whether it is a file written out as text after ``data:``."""
    return source[:5].lower() == "data:"


def shortened(source: str) -> str:
    """What errors call it: of a data URI, the beginning."""
    return f"{source[:40]}..." if is_data_uri(source) and len(source) > 40 else source


def unwrapped(source: Any) -> Any:
    """The image in ``{"bytes": ..., "path": ..., "url": ...}``, of which the first counts.

    Such are the undecoded images of `datasets`; others, and objects without these keys, are
    returned as they are.
    """
    if not isinstance(source, Mapping):
        return source
    values = (source.get(key) for key in ("bytes", "path", "url"))
    return next((value for value in values if value is not None), source)


def is_text_image(source: str) -> bool:
    """Whether `fetch_image` takes the string: a URL, or longer than a word."""
    return is_url(source) or is_data_uri(source) or len(source) >= 64


def readable(source: Any, label: str, *, fetch: bool) -> Any:
    """An image for `load_image`: a data URI, base64 string or URL as its bytes, others as they are.

    Args:
        source: The image, or an object with it; see :func:`unwrapped`.
        label: Its name in errors.
        fetch: Whether URLs are fetched.

    Raises:
        ImageError: as `fetch_image`, or it is a URL and these are not fetched.
    """
    source = unwrapped(source)
    if not isinstance(source, str) or not is_text_image(source) or os.path.exists(source):
        return source
    if is_url(source) and not fetch:
        raise ImageError(
            f"{label} is a URL, {source!r:.100}: fetched only where the configuration says "
            "`fetch: true` (under `data`) or the command `--fetch`, and by VLMProcessor"
        )
    return fetch_image(source, label)


def fetch_image(source: str, label: str) -> bytes:
    """The bytes behind a URL, a data URI or a base64 string.

    Raises:
        ImageError: the string is none of these, the server does not give the file, or it is larger
            than `MAX_BYTES` or takes longer than `SECONDS`.
    """
    if is_url(source):
        return _download(source, label)
    text = source[source.rfind(",") + 1 :]
    if len(text) > MAX_BYTES * 3 // 2:
        raise ImageError(f"{label}: more than {MAX_BYTES} bytes in base64")
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError):
        what = "not base64" if is_data_uri(source) else "no such file, and not base64 either"
        raise ImageError(f"{label}: {what}: {shortened(source)!r:.200}") from None


def _download(url: str, label: str) -> bytes:
    from huggingface_hub import get_session

    session = get_session()
    # httpx, or httpx2 from huggingface_hub 2 on: its errors are those of its client.
    library = next(c.__module__ for c in type(session).__mro__ if c.__name__ == "Client")
    client = import_module(library)
    data, started = bytearray(), time.monotonic()
    try:
        # As it is and as it comes: a server could send gigabytes compressed, or a byte a minute.
        headers = {"Accept-Encoding": "identity"}
        with session.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=SECONDS
        ) as response:
            response.raise_for_status()
            if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise ImageError(f"{label}: sent compressed ({coding}), though not asked to: {url}")
            for part in response.iter_raw():
                data += part
                if len(data) > MAX_BYTES:
                    raise ImageError(f"{label}: more than {MAX_BYTES} bytes at {url}")
                if time.monotonic() - started > SECONDS:
                    raise ImageError(f"{label}: not here after {SECONDS} s: {url}")
    except (client.HTTPError, client.InvalidURL, OSError) as error:
        raise ImageError(f"{label}: can't be fetched: {first_line(error)}") from error
    return bytes(data)
