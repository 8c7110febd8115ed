"""What a run of `hrvlm embed` is asked for, and what its folder says of it.

The folder holds ``_manifest.json`` (what decides about the rows), ``_listing.parquet`` (a row for
each image, a row group for each part) and ``part-00000000.parquet`` and so on. Row group k of the
listing is part k of the output: which rows a part has, and how they are packed, is settled before
anything runs, and no retry, kill or shard can change it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..files import hexdigest
from ..images.geometry import positive_int
from ..machine import check_dtype

FORMAT = 1  # of the folder
EXTRAS = ("patches", "tokens")  # what may be kept beside the pooled features
STORED_DTYPES = ("bfloat16", "float16")  # of the extras
DEFAULT_MAX_TOKENS = 32768
PART_BYTES = 64 << 20  # of decoded pixels, or of features where they are more
MAX_PART_ROWS = 512


@dataclass(frozen=True)
class EmbedConfig:
    """What is embedded, by what, and what is kept of it.

    Attributes:
        input: A folder, a pattern, a .jsonl, .parquet or .tar file, or ``datasets:NAME``.
        out: Folder of the results, on a disk or in an object store.
        model: As `load_encoder` takes it; or a VisionLanguageModel; or another of transformers with
            a vision tower that :mod:`hrvlm.inference.towers` knows.
        max_img_size: Limit of the longer side in pixels.
        allow_upscale: Enlarge smaller images to it.
        layer: Whose output is kept, 0 for the embeddings, negative from the end; None for the last
            one's, after the final norm as all. Of another model's tower, as the tower gives it.
        keep: Names in `EXTRAS`.
        stored: Dtype of the extras.
        dtype: Of the weights; default as in `load_encoder`.
        device: Likewise.
        backend: Likewise.
        batch_invariant: Give an image's features the same bits whatever it is packed with.
        max_tokens_per_pass: Patches and prefix tokens of a pack; one image always fits.
        rows_per_part: Images of an output file; default: by their size.
        image_column: Of tables; default: the first of ``image``, ``images``, ``path``, ``jpg``...
        split: Of a data set of the `datasets` library.
        fetch: Whether addresses in tables are fetched.
    """

    input: str
    out: str
    model: str | None = None
    max_img_size: int = 1024
    allow_upscale: bool = False
    layer: int | None = None
    keep: tuple[str, ...] = ()
    stored: str = "bfloat16"
    dtype: str | None = None
    device: str | None = None
    backend: str = "auto"
    batch_invariant: bool = False
    max_tokens_per_pass: int = DEFAULT_MAX_TOKENS
    rows_per_part: int | None = None
    image_column: str | None = None
    split: str = "train"
    fetch: bool = False

    def __post_init__(self) -> None:
        """Check now what needs no model."""
        for name in ("max_img_size", "max_tokens_per_pass"):
            positive_int(name, getattr(self, name))
        if self.rows_per_part is not None:
            positive_int("rows_per_part", self.rows_per_part)
        check_dtype(self.stored, STORED_DTYPES, "stored")
        for name in self.keep:
            if name not in EXTRAS:
                raise ValueError(f"keep={name!r}: expected one of {', '.join(EXTRAS)}")


@dataclass(frozen=True)
class Resources:
    """Where a run takes place; rows don't depend on it.

    Attributes:
        address: Of a Ray cluster; None for this machine.
        cpus: Of this machine; default: all.
        encoders: Processes with an encoder; default: one for each GPU, or one.
        threads: Of an encoder on the CPU; default: three of four CPUs, divided among the encoders.
        object_store_bytes: Memory for what is on its way; default: Ray's.
        shard: (i, n): every n-th part, from part i on.
    """

    address: str | None = None
    cpus: int | None = None
    encoders: int | None = None
    threads: int | None = None
    object_store_bytes: int | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("cpus", "encoders", "threads", "object_store_bytes"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard {index}/{count}: expected 0/{count} to {count - 1}/{count}")

    def own(self, parts: int) -> range:
        """Which of so many parts are of the shard."""
        return range(self.shard[0], parts, self.shard[1])


@dataclass(frozen=True)
class Facts:
    """What only the loaded model knows.

    Attributes:
        name: As `LoadedEncoder.name`.
        random_weights: Likewise.
        weights: A digest of a sample of them.
        dtype: Of the weights.
        hidden_size: C of the pooled features and patches.
        token_size: Of projector tokens; 0 where there is no projector.
        factor: Sides of images are whole patches of this number: that of the pixel shuffle, or of
            what another model merges; else 1.
        patch_size: Side of a patch in pixels.
        num_prefix_tokens: CLS and registers.
        image_mean: Of the pixels.
        image_std: Likewise.
    """

    name: str
    random_weights: bool
    weights: str
    dtype: str
    hidden_size: int
    token_size: int
    factor: int
    patch_size: int
    num_prefix_tokens: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


# What may differ between two runs that go on with each other; dtype and rows_per_part are compared
# with what they came to.
_WHERE = ("input", "out", "device", "backend", "fetch", "dtype", "rows_per_part")


@dataclass(frozen=True)
class Manifest:
    """What the rows in a folder are.

    Attributes:
        asked: Fields of the `EmbedConfig` that decide about rows.
        facts: Of the model.
        images: Rows in all.
        rows_per_part: Of each part but the last.
        digest: Of the listing.
        input: Where the images were.
    """

    asked: Mapping[str, Any]
    facts: Facts
    images: int
    rows_per_part: int
    digest: str
    input: str

    @classmethod
    def make(
        cls, config: EmbedConfig, facts: Facts, images: int, rows_per_part: int, digest: str
    ) -> Manifest:
        """Of a new run."""
        return cls(asked_of(config), facts, images, rows_per_part, digest, config.input)

    @property
    def parts(self) -> int:
        """Files of the complete output."""
        return -(-self.images // self.rows_per_part)

    def rows_of(self, part: int) -> int:
        """Rows of one of them."""
        return min(self.rows_per_part, self.images - part * self.rows_per_part)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @property
    def fingerprint(self) -> str:
        """Of all that decides about rows; each part, and the listing, bear it."""
        decides = {name: value for name, value in self.to_json().items() if name != "input"}
        text = json.dumps(decides, sort_keys=True)
        return hexdigest(text.encode())

    @classmethod
    def from_json(cls, stored: Any, where: str) -> Manifest:
        """From what `to_json` gave.

        Raises:
            ValueError: it is of another format, or something in it is not what it should be.
        """
        found = stored.get("format") if isinstance(stored, Mapping) else stored
        if not isinstance(stored, Mapping) or found != FORMAT:
            raise ValueError(f"{where}: format {found!r:.80}, expected {FORMAT}")
        try:
            facts = _typed(Facts, stored["facts"])
            config = _typed(EmbedConfig, {**stored["asked"], "input": stored["input"], "out": ""})
            if not isinstance(digest := stored["digest"], str):
                raise TypeError(f"digest is {digest!r:.80}, expected a string")
            for name in ("hidden_size", "factor", "patch_size"):
                positive_int(name, getattr(facts, name))
            if facts.hidden_size >= 2**31:  # Arrow counts the numbers of a vector by 32 bits
                raise ValueError(f"hidden_size is {facts.hidden_size}, which no table holds")
            images, rows = (
                positive_int(name, stored[name]) for name in ("images", "rows_per_part")
            )
            return cls(asked_of(config), facts, images, rows, digest, config.input)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: no manifest of hrvlm embed: {error}") from error

    def check_goes_on(
        self, config: EmbedConfig, images: int, digest: str, facts: Facts | None = None
    ) -> None:
        """Raise ValueError, naming what differs, unless a run would give the same rows."""
        stored = {"images of the input": self.images, "listing of the input": self.digest}
        here = asked_of(config) | {
            "images of the input": images,
            "listing of the input": digest,
            "rows_per_part": config.rows_per_part or self.rows_per_part,
            "dtype": config.dtype or self.facts.dtype,
        }
        there = {**self.asked, **stored, "rows_per_part": self.rows_per_part}
        there["dtype"] = self.facts.dtype
        if facts is not None:
            here |= {f"the model's {k}": v for k, v in dataclasses.asdict(facts).items()}
            there |= {f"the model's {k}": v for k, v in dataclasses.asdict(self.facts).items()}
        names = sorted({*here, *there})
        if differing := [n for n in names if here.get(n) != there.get(n)]:
            told = "; ".join(f"{n}: {there.get(n)!r} there, {here.get(n)!r} now" for n in differing)
            raise ValueError(f"{config.out} holds rows of another run ({told}): give another --out")


_Record = TypeVar("_Record")


def _typed(cls: type[_Record], values: Any) -> _Record:
    """The dataclass of these values, each of the type of its field; lists are tuples."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{values!r:.80}, expected names with values")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    kinds = get_type_hints(cls)
    for name, value in values.items():
        if name in kinds and not _is(value, kinds[name]):
            raise TypeError(f"{name} is {value!r:.80}, expected {kinds[name]}")
    return cls(**values)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(v, get_args(kind)[0]) for v in value)
    if kinds := get_args(kind):  # X | None
        return any(_is(value, one) for one in kinds)
    return type(value) is kind or (kind is float and type(value) is int)


def asked_of(config: EmbedConfig) -> dict[str, Any]:
    """The fields that decide about rows."""
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _WHERE}


def default_rows_per_part(pixel_bytes: float, row_bytes: float) -> int:
    """A power of two, so that neither the pixels nor the features of a part pass `PART_BYTES`.

    Args:
        pixel_bytes: Of an average image, resized.
        row_bytes: Of its row.
    """
    most = min(MAX_PART_ROWS, PART_BYTES / max(pixel_bytes, row_bytes, 1.0))
    return 1 << max(0, int(most).bit_length() - 1)


def need_extra(*modules: str) -> None:
    """Raise ValueError, naming the extra, where one of the modules is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: not installed; pip install 'hrvlm[scale]' brings all that this "
            "command needs"
        )


def parse_shard(text: str) -> tuple[int, int]:
    """``"1/4"`` as (1, 4).

    Raises:
        ValueError: it is of another form.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def parse_keep(names: Sequence[str]) -> tuple[str, ...]:
    """The extras, each once, in the order of `EXTRAS`."""
    for name in names:
        if name not in EXTRAS:
            raise ValueError(f"--keep {name!r}: expected one of {', '.join(EXTRAS)}")
    return tuple(name for name in EXTRAS if name in names)
