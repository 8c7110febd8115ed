import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hrvlm
from hrvlm import DINOv3Encoder
from hrvlm.cli import app
from hrvlm.images.processor import IMAGENET, SAT493M, get_image_processor
from hrvlm.inference.encode import EncodeOptions, encode, find_images
from hrvlm.inference.loading import LoadedEncoder, load_encoder
from hrvlm_kernels.backends import OPS
from tests.encoder.encoders import config_of, pair_of

COMMANDS = [
    "encode",
    "plan",
    "generate",
    "evaluate",
    "bench",
    "bench-generate",
    "convert",
    "verify",
    "doctor",
]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def error_of(result, code=2):
    """The one line on stderr of a command that refused."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images of unlike shapes, one of them turned by EXIF."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)

    def picture(width, height):
        small = noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height))

    picture(200, 100).save(folder / "b_wide.png")
    picture(40, 150).save(folder / "c_tall.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(160, 90).save(folder / "a_turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny encoder as a checkpoint directory, with pixel statistics of its own."""
    folder = tmp_path_factory.mktemp("model")
    _, encoder = pair_of("vit")
    encoder.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": SAT493M.mean, "image_std": SAT493M.std})
    )
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A tiny vision-language model with random weights and its processor."""
    from hrvlm.vlm.config import VLMConfig
    from hrvlm.vlm.processors import VLMProcessor, get_tokenizer
    from hrvlm.vlm.vision_language_model import VisionLanguageModel

    folder = tmp_path_factory.mktemp("vlm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<end>"])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    plain = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    plain.save_pretrained(folder)
    tokenizer = get_tokenizer(str(folder))
    config = VLMConfig(
        vision_config=config_of("vit"),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            eos_token_id=None,
        ),
        image_token_id=tokenizer.image_token_id,
        max_img_size=128,
        mp_pixel_shuffle_factor=2,
    )
    torch.manual_seed(0)
    VisionLanguageModel(config).save_pretrained(folder)
    VLMProcessor.from_config(config, tokenizer).save_pretrained(folder)
    return folder


def test_help_answers_at_once_and_without_torch():
    program = (
        "import sys, time; start = time.perf_counter()\n"
        "from hrvlm.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(time.perf_counter() - start, *sorted({'torch', 'transformers', 'PIL'} &"
        " set(sys.modules)))"
    )
    path = os.pathsep.join(["kernels", "."])
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    ).stdout
    seconds, *heavy = out.splitlines()[-1].split()
    assert float(seconds) < 1 and not heavy
    assert all(f"\n  {command} " in out for command in COMMANDS)


def test_a_real_process_ends_with_the_exit_code_and_one_line(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", "from hrvlm.cli import app; app()", "plan", "1x1", "none.png"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", "."])},
    )
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr == (
        "error: 'none.png' is neither HEIGHTxWIDTH (such as 1080x1920) nor a file\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout and "--debug" in result.stdout


def test_the_package_runs_as_a_module():
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "hrvlm", "--version"]
    out = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert (out.returncode, out.stdout) == (0, f"hrvlm {hrvlm.__version__}\n"), out.stderr


def test_version_and_bare_call():
    assert run("--version").stdout == f"hrvlm {hrvlm.__version__}\n"
    bare = run()
    assert bare.exit_code == 0 and "Commands:" in bare.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "Missing argument"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan", "8x8", "--bogus"], "No such option"),
        (["plan", "8x8", "--factor", "two"], "--factor"),
        (["plan", "8x8", "--model", "vit"], "model must be one of vits16"),
        (["plan", "8x8", "--max-img-size", "63"], "max_img_size=63"),
        (["encode", "missing.png"], "missing.png: no such file"),
        (["encode", "tests/encoder"], "no images in this directory"),
        (["generate", "--prompt", "x"], "--image is needed"),
        (["generate", "--prompt", "x", "--model", "./no", "--num-beams", "0"], "num_beams"),
        (["convert", "missing.pth", "out"], "missing.pth"),
        (["verify", "--dtype", "int8"], "dtype must be one of"),
        (["verify", "--device", "quantum"], "device 'quantum' can't be used"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert message in error_of(result) and result.stdout == ""


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback(place):
    arguments = ["plan", "8x8", "--dtype", "int8"]
    plain = run(*arguments)
    assert "Traceback" not in plain.stderr
    arguments.insert(place, "--debug")
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == error_line(plain)


def error_line(result):
    return f"error: {error_of(result)}"


def test_a_bug_is_exit_code_1_and_says_how_to_see_more(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr("hrvlm.encoder.cost.make_plan", broken)
    assert error_of(run("plan", "8x8"), 1) == "KeyError: 'surprise' (--debug shows where)"


def test_an_interrupt_is_one_line(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrvlm.encoder.cost.make_plan", interrupted)
    result = run("plan", "8x8")
    assert result.exit_code == 130 and "Traceback" not in result.stderr


def test_plan_table_and_json():
    table = run("plan", "640x960", "100x200", "--max-img-size", "960").stdout
    assert "40x60" in table and "10x15" in table and "all, packed" in table
    assert "height x width" in table and "multiples of 64 px" in table and "--factor 1" in table
    alone = run("plan", "640x960", "100x200", "--factor", "1").stdout
    assert "token" not in alone.partition("\n")[0] and "multiples of the patch size" in alone
    assert alone.splitlines()[3].split()[:6] == [
        "100x200",
        "100x200",
        "112x208",
        "1.08x",
        "7x13",
        "91",
    ]
    document = json.loads(run("plan", "640x960", "--max-img-size", "960", "--json").stdout)
    assert document["images"][0]["patch_grid"] == [40, 60]
    assert document["tokens"] == 150
    assert document["flops"] == document["gemm_flops"] + document["attention_flops"]
    small = json.loads(run("plan", "100x200", "--json").stdout)["images"][0]
    large = json.loads(run("plan", "100x200", "--upscale", "--json").stdout)["images"][0]
    assert small["resized"] == [128, 256] and large["resized"] == [512, 1024]


def test_encode_table_files_and_pictures(images, model, tmp_path):
    out = tmp_path / "new" / "out"
    result = run("encode", images, "--model", model, "--out", out, "--max-img-size", 128)
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()[2:5]] == [
        [str(images / "a_turned.jpg"), "160x90"],
        [str(images / "b_wide.png"), "100x200"],
        [str(images / "c_tall.webp"), "150x40"],
    ]
    assert [line.split()[2:6] for line in result.stdout.splitlines()[2:5]] == [
        ["128x80", "1.11x", "8x5", "40"],  # whole patches of 16, and no more
        ["64x128", "1.00x", "4x8", "32"],
        ["128x32", "1.07x", "8x2", "16"],
    ]
    assert "height x width" in result.stdout and "token" not in result.stdout
    assert "3 images" in result.stdout and "1 packed pass" in result.stdout
    assert "RANDOM" not in result.output and str(model) in result.stdout
    names = ["a_turned", "b_wide", "c_tall"]
    assert sorted(p.name for p in out.iterdir()) == [
        f"{name}.features.{ending}" for name in names for ending in ("png", "safetensors")
    ]
    widths = {}
    for name in names:
        with Image.open(out / f"{name}.features.png") as picture:
            widths[name] = picture.size
    assert widths["b_wide"][0] > widths["b_wide"][1]


def test_features_are_those_of_the_encoder_on_the_image_alone(images, model, tmp_path):
    run("encode", images, "--model", model, "--out", tmp_path, "--max-img-size", 128)
    encoder = DINOv3Encoder.from_pretrained(model).eval()
    process = get_image_processor(128, pixel_shuffle_factor=1, allow_upscale=False,
                                  image_mean=SAT493M.mean, image_std=SAT493M.std)  # fmt: skip
    for name in ("a_turned.jpg", "b_wide.png", "c_tall.webp"):
        pixels, grid = process(images / name)
        with torch.no_grad():
            alone = encoder([pixels])
        path = (tmp_path / name).with_suffix(".features.safetensors")
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        hp, wp = alone.grids[0]
        assert tensors["patches"].shape == (hp, wp, 64)
        torch.testing.assert_close(tensors["patches"].flatten(0, 1), alone.patches[0])
        torch.testing.assert_close(tensors["cls"], alone.cls[0])
        torch.testing.assert_close(tensors["registers"], alone.registers[0])
        assert json.loads(metadata["patch_grid"]) == [hp, wp] == list(grid)
        assert metadata["weights"] == "pretrained" and metadata["image"] == name
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current


def test_random_weights_are_never_hidden_and_always_the_same(images, tmp_path):
    arguments = ("encode", images / "b_wide.png", "--max-img-size", 64)
    shown = run(*arguments)
    assert "weights are random" in shown.stderr and "RANDOM WEIGHTS" in shown.stdout
    torch.manual_seed(99)
    document = json.loads(run(*arguments, "--json", "--out", tmp_path / "1").stdout)
    assert document["weights"] == "random" and "RANDOM WEIGHTS" in document["model"]
    run(*arguments, "--out", tmp_path / "2")
    stored = [next((tmp_path / n).glob("*.safetensors")) for n in "12"]
    with (
        safe_open(stored[0], framework="pt") as first,
        safe_open(stored[1], framework="pt") as second,
    ):
        assert first.metadata() == second.metadata()
        assert first.metadata()["weights"] == "random"
        assert first.get_tensor("cls").shape == (384,)
        for key in ("cls", "registers", "patches"):
            assert torch.equal(first.get_tensor(key), second.get_tensor(key))


def test_json_is_alone_on_stdout_and_complete(images, model, tmp_path):
    result = run("encode", images, "--model", model, "--json", "--max-tokens-per-pass", 85,
                 "--out", tmp_path, "--max-img-size", 128)  # fmt: skip
    document = json.loads(result.stdout)
    assert [image["pass"] for image in document["images"]] == [0, 0, 1]
    assert [p["images"] for p in document["passes"]] == [2, 1]
    for i, timed in enumerate(document["passes"]):
        own = [image for image in document["images"] if image["pass"] == i]
        assert sum(image["share"] for image in own) == pytest.approx(1)
        assert sum(image["seconds"] for image in own) == pytest.approx(timed["seconds"])
    assert document["patches"] == sum(image["patches"] for image in document["images"])
    assert all(1 <= image["stretch"] < 1.12 for image in document["images"])
    assert document["weights"] == "pretrained" and document["attention_backend"] == "sdpa"
    assert all(os.path.exists(image["picture"]) for image in document["images"])


def test_passes_do_not_change_features(images, model, tmp_path):
    for name, limit in (("one", 4096), ("many", 1)):
        options = ("--max-tokens-per-pass", limit, "--max-img-size", 128, "--no-pictures")
        result = run("encode", images, "--model", model, "--out", tmp_path / name, *options)
        assert ("3 packed passes" in result.stdout) == (limit == 1)
    for path in (tmp_path / "one").iterdir():
        assert path.suffix == ".safetensors"
        with (
            safe_open(path, framework="pt") as one,
            safe_open(tmp_path / "many" / path.name, framework="pt") as many,
        ):
            for key in ("cls", "registers", "patches"):
                torch.testing.assert_close(one.get_tensor(key), many.get_tensor(key))


def test_bfloat16_features_are_stored_as_such(images, model, tmp_path):
    result = run("encode", images / "b_wide.png", "--model", model, "--out", tmp_path,
                 "--dtype", "bfloat16", "--max-img-size", 64)  # fmt: skip
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "b_wide.features.safetensors", framework="pt") as stored:
        assert stored.get_tensor("patches").dtype == torch.bfloat16


def test_joint_pictures_differ_from_single_ones(images, model, tmp_path):
    for name, *options in (("single",), ("joint", "--joint-pca", "--max-tokens-per-pass", 1)):
        run("encode", images, "--model", model, "--out", tmp_path / name, "--max-img-size", 128,
            *options)  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "joint").glob("*.png"))
    assert len(names) == 3
    differ = [(tmp_path / d / n).read_bytes() for n in names for d in ("single", "joint")]
    assert all(a != b for a, b in zip(differ[::2], differ[1::2], strict=True))


def test_bad_images_are_named_refused_or_skipped(images, model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((images / "b_wide.png").read_bytes()[:300])
    arguments = ("encode", broken, images / "b_wide.png", "--model", model, "--max-img-size", 64)
    assert "broken.png" in error_of(run(*arguments))
    skipping = run(*arguments, "--skip-bad")
    assert skipping.exit_code == 0 and "b_wide.png" in skipping.stdout
    assert f"skipped {broken}: " in skipping.stderr
    document = json.loads(run(*arguments, "--skip-bad", "--json").stdout)
    assert [bad["image"] for bad in document["bad"]] == [str(broken)]
    assert len(document["images"]) == 1
    nothing = run("encode", broken, "--model", model, "--skip-bad")
    assert nothing.exit_code == 2 and "no image could be read" in nothing.stderr


def test_directories_expand_sorted_and_files_stay_in_order(images):
    tall = images / "c_tall.webp"
    found = find_images([tall, images])
    assert [p.name for p in found] == ["c_tall.webp", "a_turned.jpg", "b_wide.png", "c_tall.webp"]


def test_results_of_equal_names_do_not_collide(images, model, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for folder, name in (("x", "one.png"), ("y", "one.png"), ("y", "ONE.bmp")):
        Image.new("RGB", (64, 64)).save(tmp_path / folder / name)
    out = tmp_path / "out"
    arguments = ("encode", tmp_path / "x", tmp_path / "y", "--model", model, "--out", out)
    document = json.loads(run(*arguments, "--json").stdout)
    written = [image["features"] for image in document["images"]]
    assert len(set(written)) == 3 and len(list(out.glob("*.png"))) == 3


def test_names_that_are_no_text(model, tmp_path):
    name = os.fsdecode(b"caf\xc3\xa9 \xff [red].png")
    try:
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    arguments = ("encode", tmp_path / name, "--model", model, "--out", tmp_path / "out")
    table = run(*arguments)
    assert table.exit_code == 0 and "café \\udcff [red].png" in table.stdout
    document = json.loads(run(*arguments, "--json").stdout)
    assert os.path.exists(document["images"][0]["features"])


def test_too_large_a_pass_says_what_to_lower(images, model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(DINOv3Encoder, "forward", full)
    result = run("encode", images, "--model", model, "--max-img-size", 128)
    message = error_of(result, 1)
    assert "3 images with 88 patches" in message and "lower --max-tokens-per-pass" in message


def test_inputs_are_never_replaced(model, tmp_path):
    source = tmp_path / "one.png"
    Image.new("RGB", (64, 64)).save(source)
    inside = run("encode", tmp_path, "--model", model, "--out", tmp_path)
    assert "is one of the inputs" in error_of(inside)
    assert run("encode", source, "--model", model, "--out", tmp_path).exit_code == 0
    again = run("encode", source, tmp_path / "one.features.png", "--model", model, "--out",
                tmp_path)  # fmt: skip
    assert "is an input and would be replaced" in error_of(again)


def test_without_out_nothing_is_written(images, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("encode", images, "--model", model, "--max-img-size", 64).exit_code == 0
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing_half_done(images, model, tmp_path, monkeypatch):
    target = tmp_path / "b_wide.features.png"
    target.write_bytes(b"of an earlier run")

    def failing(self, stream, **kwargs):
        stream.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("PIL.Image.Image.save", failing)
    result = run("encode", images / "b_wide.png", "--model", model, "--out", tmp_path)
    assert "disk full" in error_of(result)
    assert target.read_bytes() == b"of an earlier run"
    assert {p.name for p in tmp_path.iterdir()} == {target.name, "b_wide.features.safetensors"}


def test_model_of_one_layer_and_no_registers(tmp_path):
    encoder = DINOv3Encoder(config_of("no_registers_no_biases", num_hidden_layers=1)).freeze()
    Image.new("RGB", (16, 16)).save(tmp_path / "dot.png")
    options = EncodeOptions(max_img_size=16, out=tmp_path / "out")
    loaded = LoadedEncoder(encoder, "tiny", False, IMAGENET)
    result = encode([tmp_path / "dot.png"], loaded, options)
    assert result.images[0].geometry.patch_grid == (1, 1)
    with safe_open(result.images[0].features, framework="pt") as stored:
        assert stored.get_tensor("registers").shape == (0, 64)
        assert stored.get_tensor("patches").shape == (1, 1, 64)
    assert result.images[0].picture.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, "backend 'triton' can't run: the tensors are on the CPU"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"device": "cuda:77"}, "device 'cuda:77' can't be used"),
        ({"model": "./missing"}, "no such directory"),
        (
            {"model": "pyproject.toml"},
            "pyproject.toml: neither safetensors nor a file of torch.save",
        ),
    ],
)
def test_encoders_that_cannot_be_had(options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=message):
        load_encoder(**({"device": "cpu"} | options))


def test_a_checkpoint_that_lacks_weights_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing \(1\): norm.bias"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is of type 'llama', expected 'dinov3_vit'"):
        load_encoder(str(tmp_path))


def test_convert_says_what_it_found(model, tmp_path):
    out = tmp_path / "converted"
    result = run("convert", model, out, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        count = len(stored.keys())
    assert "transformers layout" in result.stdout and f"wrote {count} tensors" in result.stdout
    assert "hidden_size 64, 3 layers" in result.stdout
    assert "--overwrite replaces it" in error_of(run("convert", model, out))
    document = json.loads(run("convert", model, out, "--overwrite", "--json").stdout)
    assert document["layout"] == "transformers" and document["tensors"] == count
    assert document["config"]["num_attention_heads"] == 2
    assert "dtype must be one of" in error_of(run("convert", model, out, "--dtype", "int4"))


def test_doctor_reports_versions_and_backends():
    document = json.loads(run("doctor", "--json").stdout)
    assert document["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        document["packages"]["torch"] == torch.__version__
    )
    assert document["hrvlm"] == hrvlm.__version__ and document["problems"] == []
    assert set(document["backends"]) == {"auto", "triton", "flash_attn", "sdpa", "eager"}
    for ops in document["backends"].values():
        assert set(ops) == set(OPS)
    table = run("doctor")
    assert table.exit_code == 0 and "torch" in table.stdout and "varlen_attention" in table.stdout


def test_doctor_finds_a_package_that_does_not_import(monkeypatch):
    from hrvlm.commands import doctor

    def import_module(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    result = run("doctor")
    assert result.exit_code == 1
    assert "PROBLEM: torchvision" in result.stdout and "nms does not exist" in result.stdout


def test_generate_streams_text_and_reports_speed(images, vlm):
    pictures = ("--image", images / "a_turned.jpg", "--image", images / "b_wide.png")
    arguments = ("generate", "--model", vlm, *pictures, "--prompt", "What is this?")
    arguments += ("--max-new-tokens", 6)
    streamed = run(*arguments)
    assert streamed.exit_code == 0, streamed.output
    assert "6 new in" in streamed.stderr and "tokens/s" in streamed.stderr
    result = run(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["new_tokens"] == 6 and document["first_token_seconds"] > 0
    assert document["text"] == streamed.stdout.removesuffix("\n")
    assert document["prompt_tokens"] > len("What is this?")
    beams = json.loads(run(*arguments, "--num-beams", 2, "--json").stdout)
    assert beams["new_tokens"] == 6 and beams["first_token_seconds"] is None


def test_generate_refuses_what_is_no_such_model(images, model, vlm):
    arguments = ("generate", "--prompt", "x", "--image", images / "b_wide.png", "--model")
    assert "is of type 'dinov3_vit', expected 'hrvlm'" in error_of(run(*arguments, model))
    assert "notes.txt" in error_of(run(*arguments, vlm, "--image", images / "notes.txt"))
    assert "image token" in error_of(run(*arguments, vlm, "--prompt", "<|image|>"))
