"""Images that come as text: URLs, data URIs, base64."""

from __future__ import annotations

import base64
import binascii
import time

from .formats import ImageError

MAX_BYTES = 64_000_000  # of a file that is fetched or written as text
SECONDS = 60  # to fetch one


def is_text_image(source: str) -> bool:
    """Whether `fetch_image` takes the string: a URL, or longer than a word."""
    return source.startswith(("http://", "https://", "data:")) or len(source) >= 64


def fetch_image(source: str, label: str) -> bytes:
    """The bytes behind a URL, a data URI or a base64 string.

    Raises:
        ImageError: the string is none of these, the server does not give the file, or it is larger
            than `MAX_BYTES` or takes longer than `SECONDS`.
    """
    if source.startswith(("http://", "https://")):
        return _download(source, label)
    text = source[source.rfind(",") + 1 :]
    if len(text) > MAX_BYTES * 3 // 2:
        raise ImageError(f"{label}: more than {MAX_BYTES} bytes in base64")
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(
            f"{label}: no such file, and not base64 either: {source[:60]!r}..."
        ) from None


def _download(url: str, label: str) -> bytes:
    import httpx
    from huggingface_hub import get_session

    data, started = bytearray(), time.monotonic()
    try:
        # As it is and as it comes: a server could send gigabytes compressed, or a byte a minute.
        headers = {"Accept-Encoding": "identity"}
        with get_session().stream(
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
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ImageError(f"{label}: can't be fetched: {error}") from error
    return bytes(data)
