"""What is fuzzed: for each place where something comes from outside, inputs and the rule.

A target makes an input from a random source and a corpus, and tries it: what can't be used raises
one of the target's errors, what can be used is right by a property of the result. Anything else is
a find.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.hardening import embed_inputs
from benchmarks.hardening.draws import changed, changed_bytes, changed_text, odd_value

CORPUS = Path(__file__).parent / "corpus"
Draw = Callable[[Random], Any]


@dataclass(frozen=True)
class Target:
    """A place that takes what comes from outside.

    Attributes:
        draw: Makes an input.
        run: Tries it; raises AssertionError where the result is wrong.
        errors: What it may raise.
        cases: Of a million, how many are its own.
        seeds: The inputs of its corpus, as `run` takes them.
    """

    draw: Draw
    run: Callable[[Any], object]
    errors: tuple[type[BaseException], ...]
    cases: int
    seeds: Callable[[], list[Any]]


class TooSlow(BaseException):  # nothing that handles errors takes it for one of its own
    """A case has used up its CPU seconds."""


@functools.cache
def corpus(name: str) -> list[Any]:
    """The minimal inputs of a target, plain data."""
    return json.loads((CORPUS / f"{name}.json").read_text(encoding="utf-8"))


def attempt(target: Target, value: Any) -> str:
    """Try an input: "taken", or the name of the error.

    Raises:
        Exception: what the target may not raise.
    """
    try:
        target.run(value)
    except target.errors as error:
        worded = str(error).strip() or isinstance(error, MemoryError)
        assert worded, f"{type(error).__name__} without a word"
        return type(error).__name__
    return "taken"


# --- sizes ---------------------------------------------------------------------------------------


def _geometry(value: dict[str, Any]) -> None:
    from hrvlm.images.geometry import tile_grid, token_grid

    given = dict(value)
    if given.pop("tiles", None) is True:
        tiles = tile_grid(**given)
        side, (n_h, n_w) = int(given["splitted_image_size"]), tiles.tiles
        assert (tiles.height, tiles.width) == (n_h * side, n_w * side)
        assert min(n_h, n_w) >= 1 and max(n_h, n_w) * side <= int(given["max_img_size"])
        return
    found = token_grid(**given)
    patch, factor = int(given.get("patch_size", 16)), int(given.get("factor", 4))
    (hp, wp), (gh, gw) = found.patch_grid, found.token_grid
    assert (found.height, found.width) == (hp * patch, wp * patch)
    assert (hp, wp) == (gh * factor, gw * factor) and min(gh, gw) >= 1
    limit = int(given["max_img_size"])
    assert max(found.height, found.width) <= limit
    height, width = int(given["height"]), int(given["width"])
    assert (height >= width) == (gh >= gw) or gh == gw
    if given.get("allow_upscale") is False:
        unit = patch * factor
        assert found.height < height + unit and found.width < width + unit


# --- placeholders --------------------------------------------------------------------------------


def _placeholders(value: dict[str, Any]) -> None:
    from hrvlm.vlm.placeholders import as_grids, count_tokens, images_per_sample

    grids = as_grids(value["grids"])
    tokens = count_tokens(grids, value["factor"], value["append_cls"])
    numbers = images_per_sample(value["placeholders"], grids, tokens)
    assert sum(numbers) == len(grids) and len(numbers) == len(value["placeholders"])
    first = 0
    for count, number in zip(value["placeholders"], numbers, strict=True):
        assert count == sum(tokens[first : first + number])
        first += number


def _draw_placeholders(draw: Random) -> dict[str, Any]:
    factor = draw.choice((1, 2, 3, 4))
    grids = [
        [factor * draw.randrange(1, 6), factor * draw.randrange(1, 6)]
        for _ in range(draw.randrange(5))
    ]
    counts, placeholders = [h * w // factor**2 for h, w in grids], []
    while counts:
        take = draw.randrange(1, len(counts) + 1)
        placeholders.append(sum(counts[:take]))
        del counts[:take]
    placeholders += [0] * draw.randrange(2)
    if placeholders and draw.random() < 0.3:
        placeholders[draw.randrange(len(placeholders))] = draw.randrange(40)
    value = {"grids": grids, "factor": factor, "append_cls": False, "placeholders": placeholders}
    if draw.random() < 0.6:
        value["grids"] = changed(draw, grids)
    if draw.random() < 0.2:
        value["factor"] = odd_value(draw)
    if draw.random() < 0.1:
        value["append_cls"] = draw.choice((True, False))
    return value


# --- packed layouts ------------------------------------------------------------------------------


def _packed(value: dict[str, Any]) -> None:
    from hrvlm_kernels import PackedGrids

    given = dict(value)
    made, factor = given.pop("made"), given.pop("factor", 1)
    make = getattr(PackedGrids, made)
    first = given.pop("first")
    packed = make(first, **given)
    n = packed.total_tokens
    assert packed.cu_seqlens.tolist()[-1] == n == sum(packed.lengths) and n <= 5_000_000
    assert packed.max_seqlen == max(packed.lengths, default=0)
    again = pickle.loads(pickle.dumps(packed))
    assert (again.lengths, again.grids) == (packed.lengths, packed.grids)
    leaves, spec = torch.utils._pytree.tree_flatten(packed)
    text = torch.utils._pytree.treespec_dumps(spec)
    same = torch.utils._pytree.tree_unflatten(leaves, torch.utils._pytree.treespec_loads(text))
    assert (same.lengths, same.grids) == (packed.lengths, packed.grids)
    if packed.grids is not None:
        assert packed.coords.shape == (n, 2) and bool((packed.coords.abs() <= 1).all())
        rows = packed.shuffle_index(factor)
        assert rows.numel() == n - len(packed) * packed.num_prefix_tokens
        assert len(set(rows.flatten().tolist())) == rows.numel()


_MADE = ("from_grids", "from_lengths", "from_cu_seqlens")


def _draw_packed(draw: Random) -> dict[str, Any]:
    value = changed(draw, draw.choice(corpus("packed")), times=draw.choice((0, 1, 1, 2)))
    if isinstance(value, dict):
        value.setdefault("made", "from_grids")
        value.setdefault("first", [])
        if not isinstance(value["made"], str) or value["made"] not in _MADE:
            value["made"] = "from_lengths"
        if _is_huge(value["first"]):  # a pack of many tokens is right, and takes memory
            value["first"] = [[1, 1]] if value["made"] == "from_grids" else [0, 1]
        return value
    return {"made": "from_lengths", "first": value}


def _is_huge(value: Any) -> bool:
    if isinstance(value, list | tuple | range):
        return any(map(_is_huge, value))
    return isinstance(value, int) and 2000 < value <= 2**31


# --- YAML ----------------------------------------------------------------------------------------

_YAML_WORDS = (
    "\n",
    "  ",
    "\t",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!!python/object:x ",
    "!!binary ",
    "!!set ",
    "!!timestamp ",
    "|\n",
    ">",
    "'",
    '"',
    "#",
    "---\n",
    "...",
    "%YAML 1.1\n",
    "1e4",
    ".inf",
    "~",
    "0o7",
    "1:30",
    "2024-01-01",
    "\x00",
    "\ufeff",
    "é",
    "? ",
    "!<",
    "yes",
)


def _yaml(value: Any) -> None:
    from hrvlm.files import parse_yaml

    result = parse_yaml(value, "config.yaml")
    assert not isinstance(result, type)


def _draw_yaml(draw: Random) -> str:
    return changed_text(draw, draw.choice(corpus("yaml")), _YAML_WORDS)


def _config(value: Any) -> None:
    from hrvlm.training.config import TrainingConfig

    TrainingConfig.from_dict(value)


# --- rows ----------------------------------------------------------------------------------------


def _rows(value: Any) -> None:
    from hrvlm.data.rows import images_of, messages_of, plain_row, system_of, text_of, turns_of
    from hrvlm.inference.questions import questions_of

    for question in questions_of(0, value):
        assert isinstance(question.prompt, str) and question.references
    row = plain_row(value)
    turns, user, assistant = turns_of(row)
    pairs = [(text_of(i, t, user), text_of(i, t, assistant)) for i, t in enumerate(turns)]
    images = images_of(row)
    messages = messages_of(images, pairs, system_of(row))
    placed = sum(part["type"] == "image" for m in messages for part in m["content"])
    assert placed == len(images)


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _lines(value: bytes) -> None:
    from hrvlm.data.sources import JsonLines, _located

    path = _folder() / "rows.jsonl"
    path.write_bytes(value)
    rows = JsonLines(path)
    for index in range(len(rows)):
        _located(rows[index], path.parent)


def _draw_lines(draw: Random) -> bytes:
    rows = [changed(draw, row) for row in draw.sample(corpus("rows"), 2)]
    lines = [json.dumps(row, default=str, skipkeys=True) for row in rows]
    data = "\n".join(lines).encode("utf-8", "replace")
    if draw.random() < 0.02:
        data += b"\n" + draw.choice((b"[", b'{"a":')) * draw.choice((10, 3000, 100_000))
    return changed_bytes(draw, data)


# --- checkpoints ---------------------------------------------------------------------------------


@functools.cache
def _checkpoint_files() -> dict[str, bytes]:
    from safetensors.torch import save

    rng = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.w": torch.randn(3, i + 1, generator=rng) for i in range(3)}
    tensors["half"] = torch.zeros(2, dtype=torch.bfloat16)
    stream = io.BytesIO()
    torch.save({"model": tensors, "step": 3}, stream)
    old = io.BytesIO()
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    return {".safetensors": save(tensors), ".pth": stream.getvalue(), ".bin": old.getvalue()}


def _checkpoint(value: tuple[str, bytes]) -> None:
    from hrvlm.checkpoints.files import load_checkpoint

    suffix, data = value
    path = _folder() / f"weights{suffix}"
    path.write_bytes(data)
    loaded = load_checkpoint(path)
    for key, tensor in loaded.items():
        assert isinstance(key, str) and isinstance(tensor, torch.Tensor)


def _draw_checkpoint(draw: Random) -> tuple[str, bytes]:
    files = _checkpoint_files()
    suffix = draw.choice((".safetensors",) * 6 + (".pth", ".bin"))
    data = changed_bytes(draw, files[suffix])
    return draw.choice((suffix,) * 8 + tuple(files)), data


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_register_tokens=1, patch_size=2,
    )  # fmt: skip
    return DINOv3ViTModel(config).state_dict()


def _keys(value: dict[str, Any]) -> None:
    from hrvlm.checkpoints.convert import detect_layout, infer_config, to_transformers

    detect_layout(value)
    found = to_transformers(value)
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    infer_config(value, num_attention_heads=1)


def _draw_keys(draw: Random) -> dict[str, Any]:
    from hrvlm.checkpoints.convert import from_transformers, infer_config

    layout = draw.choice(("transformers", "fused", "meta", "timm"))
    state: dict[str, Any] = dict(_layouts()[layout]) if layout in _layouts() else {}
    if not state:
        config = infer_config(_state(), num_attention_heads=1)
        state = dict(from_transformers(_state(), layout, config))
        _layouts()[layout] = dict(state)
    for _ in range(draw.randrange(4)):
        key = draw.choice(list(state))
        how = draw.randrange(6)
        if how == 0:
            del state[key]
        elif how == 1:
            state[changed_text(draw, key, (".", "0", "layer", "blocks", "weight"))] = state[key]
        elif how == 2 and isinstance(state[key], torch.Tensor):
            state[key] = state[key].flatten()[: draw.randrange(5)]
        elif how == 3 and isinstance(state[key], torch.Tensor):
            state[key] = state[key].to(draw.choice((torch.int8, torch.float16, torch.bool)))
        elif how == 4:
            state[key] = odd_value(draw)
        else:
            state = {
                f"{draw.choice(('module.', 'teacher.backbone.', 'x'))}{k}": v
                for k, v in state.items()
            }
        if not state:
            break
    return state


@functools.cache
def _layouts() -> dict[str, dict[str, Any]]:
    return {}


# --- images --------------------------------------------------------------------------------------


def _intake(value: Any) -> None:
    from hrvlm.images.intake import load_image

    source, options = value
    image = load_image(source, max_pixels=1_000_000, **options)
    assert image.mode == "RGB" and min(image.size) >= 1


def _draw_intake(draw: Random) -> tuple[Any, dict[str, Any]]:
    from benchmarks.images.mutations import case

    options: dict[str, Any] = {}
    if draw.random() < 0.1:
        options["channels"] = draw.choice(("first", "last", "", 1))
    if draw.random() < 0.1:
        options["background"] = draw.choice(
            ((1, 2, 3), (1, 2), "red", (0, 0, 256), (0.5, 1, 2), None)
        )
    kind = draw.randrange(8)
    if kind == 0:
        return odd_value(draw), options
    if kind < 4:
        shape = [
            draw.choice((0, 1, 2, 3, 4, 5, 17))
            for _ in range(draw.choice((0, 1, 2, 2, 3, 3, 3, 4)))
        ]
        dtype = draw.choice(
            ("uint8", "uint16", "float32", "float64", "float16", "bool", "int64", "complex64", "U1")
        )
        array = np.zeros(shape, dtype=dtype)
        if array.size and array.dtype.kind == "f":
            array.flat[0] = draw.choice((0.5, 1.0, 1.1, -0.1, np.nan, np.inf))
        if draw.random() < 0.3 and array.dtype.kind in "fbiu" and dtype != "uint16":
            return torch.from_numpy(array), options
        return array, options
    _, data = case(_image_files(), draw.randrange(1 << 30), draw.randrange(1 << 30))
    return data, options


@functools.cache
def _image_files() -> dict[str, bytes]:
    from benchmarks.images.mutations import seeds

    return {name: data for name, data in seeds().items() if len(data) < 20_000}


# --- chat templates ------------------------------------------------------------------------------

_TEMPLATE_WORDS = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    "{% endif %}",
    "messages[0]",
    "m.content",
    "|length",
    "|tojson",
    "raise_exception('no')",
    "1/0",
    "[].x",
    "''.__class__",
    "range(9)",
    "namespace(a=1)",
    "{% set x = 1 %}",
    "{# ",
    " #}",
    "strftime_now('%Y')",
    "{% generation %}",
    "{% break %}",
    "<|im_start|>",
    "cycler.__init__",
    "x" * 50,
)


@functools.cache
def _processor() -> Any:
    from hrvlm import VLMProcessor
    from hrvlm.reader.model import reader_path

    return VLMProcessor.from_pretrained(reader_path())


def _template(value: tuple[Any, Any]) -> None:
    from hrvlm.vlm.answers import answer_pieces

    template, messages = value
    processor = _processor()

    def render(part: Any, **options: Any) -> str:
        return processor.apply_chat_template(part, template, tokenize=False, **options)

    text = render(messages)
    if isinstance(text, str):  # of a batch of chats, a list
        pieces = answer_pieces(render, messages)
        assert text.startswith("".join(piece for piece, _ in pieces))


def _draw_template(draw: Random) -> tuple[Any, Any]:
    chats, templates = corpus("chats"), corpus("templates")
    template = draw.choice(templates)
    if draw.random() < 0.7:
        changed_one = changed_text(draw, template, _TEMPLATE_WORDS)
        # Filters a hundred times over take as long as they like: templates come with a model.
        template = changed_one if len(changed_one) < 2000 else template
    return template, changed(draw, draw.choice(chats), times=draw.choice((0, 0, 1, 2)))


# --- exported graphs -----------------------------------------------------------------------------


@functools.cache
def _program() -> tuple[Any, Any]:
    from transformers import DINOv3ViTConfig

    from hrvlm import DINOv3Encoder
    from hrvlm.export.graphs import export_program, graph_of

    config = DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_register_tokens=4,
    )
    encoder = DINOv3Encoder(config).eval()
    weights = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0.0, 0.15, generator=weights)
    return graph_of(encoder, "pack"), export_program(encoder, "pack").module()


def _graph(sizes: Any) -> None:
    graph, program = _program()
    inputs = graph.random_inputs(sizes)
    with torch.no_grad():
        for got, expected in zip(program(*inputs), graph(*inputs), strict=True):
            assert got.shape == expected.shape
            assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def _draw_graph(draw: Random) -> list[tuple[int, int]]:
    sizes = [(draw.randrange(1, 9), draw.randrange(1, 9)) for _ in range(draw.randrange(1, 6))]
    return sizes if sum(h * w for h, w in sizes) > 1 else [(1, 2)]


def _mutated(name: str, times: int | None = None) -> Draw:
    return lambda draw: changed(draw, draw.choice(corpus(name)), times)


def _seeds(name: str, wrap: Callable[[Any], Any] = lambda value: value) -> Callable[[], list[Any]]:
    return lambda: [wrap(value) for value in corpus(name)]


def _bytes(value: str) -> bytes:
    return bytes.fromhex(value)


USUAL = (ValueError, TypeError)
TARGETS: dict[str, Target] = {
    "geometry": Target(_mutated("geometry"), _geometry, USUAL, 255_000, _seeds("geometry")),
    "placeholders": Target(
        _draw_placeholders, _placeholders, (ValueError,), 245_000, _seeds("placeholders")
    ),
    "packed": Target(_draw_packed, _packed, USUAL, 60_000, _seeds("packed")),
    "yaml": Target(_draw_yaml, _yaml, (ValueError,), 50_000, _seeds("yaml")),
    "config": Target(_mutated("config", None), _config, (ValueError,), 100_000, _seeds("config")),
    "rows": Target(_mutated("rows"), _rows, (ValueError,), 150_000, _seeds("rows")),
    "lines": Target(_draw_lines, _lines, (), 30_000, _seeds("lines", _bytes)),
    "checkpoints": Target(
        _draw_checkpoint, _checkpoint, (ValueError,), 35_000,
        _seeds("checkpoints", lambda value: (value[0], _bytes(value[1]))),
    ),
    "keys": Target(_draw_keys, _keys, USUAL, 15_000, lambda: [dict(_state())]),
    "intake": Target(
        _draw_intake, _intake, (*USUAL, OSError), 25_000,
        _seeds("intake", lambda value: (_bytes(value), {})),
    ),
    "inputs": Target(
        embed_inputs.draw_input, embed_inputs.try_input, (ValueError,), 12_000,
        lambda: [*embed_inputs.inputs().items()],
    ),
    "folders": Target(
        embed_inputs.draw_folder, embed_inputs.try_folder, (ValueError,), 8_000,
        lambda: [dict(embed_inputs.folder())],
    ),
    # A template may take all it likes: it comes with a model.
    "templates": Target(
        _draw_template, _template, (*USUAL, MemoryError, TooSlow), 14_000, _seeds("pairs", tuple)
    ),
    "graphs": Target(_draw_graph, _graph, (), 1_000, _seeds("graphs")),
}  # fmt: skip
