"""What sits on one module acts on the kernels as in eager, whatever is fused around it."""

import copy
from functools import partial

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.activations import ACT2FN

from hrvlm.encoder import layers
from tests.encoder.kinds import ON_KERNELS, pair_of
from tests.encoder.test_plain_modules import RowScaled
from tests.kernels.helpers import interpreter_only

peft = pytest.importorskip("peft")
pytestmark = interpreter_only

CPU = torch.device("cpu")


def on(backend, encoder):
    encoder.backend = backend
    return encoder


def encoder_of(kind):
    _, encoder = pair_of(
        kind, num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=1
    )
    return encoder


def features_of(encoder, patches, *, recording=False):
    with torch.set_grad_enabled(recording):
        return encoder(patches, grids=[(1, 2)]).packed_last_hidden_state.detach()


def replace(kind):
    def change(encoder, name):
        encoder.set_submodule(name, kind(encoder.get_submodule(name)))

    return change


def adapt(**options):
    def change(encoder, name):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False, **options)
        peft.get_peft_model(encoder, lora)

    return change


def changed(output):
    """Not a multiple, which the final norm would take back."""
    ramp = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
    return 1.5 * output + ramp.view_as(output)


def hook(encoder, name):
    encoder.get_submodule(name).register_forward_hook(lambda _module, _args, out: changed(out))


def hook_before(encoder, name):
    encoder.get_submodule(name).register_forward_pre_hook(lambda _, args: (changed(args[0]),))


def own_forward(encoder, name):
    module = encoder.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **options: changed(forward(*args, **options))


def prune_weight(encoder, name):
    prune.random_unstructured(encoder.get_submodule(name), "weight", 0.5)


def tune_norm(encoder, name):
    peft.get_peft_model(encoder, peft.LNTuningConfig(target_modules=[name]))
    with torch.no_grad():
        encoder.get_parameter(f"{name}.ln_tuning_layers.default.weight").add_(torch.arange(32) / 32)


def offload(encoder, name):
    accelerate.cpu_offload(encoder.get_submodule(name), execution_device=CPU)


ANY = ("Linear", "QKVLinear", "PatchEmbedding", "LayerNorm", "QKVBias", "LayerScale")
PARENTS = ("EncoderEmbeddings", "EncoderMLP", "EncoderAttention", "EncoderLayer")
LINEAR = ("Linear", "QKVLinear")
ADAPTABLE = (*LINEAR, "PatchEmbedding")
# How a module is changed, the classes that this is done to, and whether it computes the same.
CHANGES = {
    "hook": (hook, (*ANY, *PARENTS, "GELUActivation"), False),
    "pre-hook": (hook_before, LINEAR, False),
    "forward of its own": (own_forward, ("LayerScale", "LayerNorm"), False),
    "offloaded": (offload, (*ANY, *PARENTS), True),
    "in int8": (replace(RowScaled), ("Linear",), False),
    "pruned": (prune_weight, ("QKVLinear",), False),
    "LoRA": (adapt(), ADAPTABLE, False),
    "DoRA": (adapt(use_dora=True), LINEAR, False),
    "tuned norm": (tune_norm, ("LayerNorm",), False),
}
WITH_GRADIENTS = ("hook", "LoRA")
CASES = [
    (kind, change)
    for kind in ON_KERNELS
    for change in (CHANGES if "dinov3" in kind else ("hook", "offloaded", "LoRA"))
]


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_a_change_of_any_one_module_acts_as_in_eager(kind, change, rng):
    """In inference, where the weights have been folded before, and while gradients are recorded."""
    act, classes, is_same = CHANGES[change]
    base = encoder_of(kind)
    patches = torch.randn(2, 768, generator=rng)
    before = features_of(base, patches)
    names = [name for name, module in base.named_modules() if type(module).__name__ in classes]
    assert names
    for name in names:
        encoder = copy.deepcopy(base)
        features_of(encoder, patches)  # folds
        act(encoder, name)
        expected = features_of(on("eager", encoder), patches)
        inferred = features_of(on("triton", encoder), patches)
        assert is_same or (expected - before).abs().max() > 1e-3, name
        torch.testing.assert_close(inferred, expected, rtol=1e-4, atol=1e-5, msg=name)
        if change in WITH_GRADIENTS:
            recorded = features_of(encoder, patches, recording=True)
            torch.testing.assert_close(recorded, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ON_KERNELS)
def test_merging_between_inferences_gives_the_adapted_output(kind, use_dora, rng):
    """Merged in place, taken out again, and merged for good: the weights are the same tensors."""
    encoder = encoder_of(kind)
    patches = torch.randn(2, 768, generator=rng)
    before = features_of(encoder, patches)
    torch.manual_seed(0)
    targets = ["patch_embeddings", "qkv", "o_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    adapted = peft.get_peft_model(encoder, lora)
    after = features_of(encoder, patches)
    assert (after - before).abs().max() > 0.1
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-4)
    adapted.merge_adapter()
    close(features_of(encoder, patches), after)
    adapted.unmerge_adapter()
    close(features_of(encoder, patches), after)
    assert adapted.merge_and_unload() is encoder
    close(features_of(encoder, patches), after)


def average_by_data(teacher, student):
    """As in the training code of DINO."""
    for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
        k.data.mul_(0.5).add_(0.5 * q.detach().data)


def average_by_foreach(teacher, student):
    with torch.no_grad():
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.5)


def average_by_copies(teacher, student):
    with torch.no_grad():
        for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
            k.copy_(k + 0.5 * (q - k))


def average_by_loading(teacher, student):
    states = student.state_dict()
    teacher.load_state_dict({k: v.lerp(states[k], 0.5) for k, v in teacher.state_dict().items()})


def average_by_state_dict(teacher, student):
    for key, value in teacher.state_dict().items():
        value.lerp_(student.state_dict()[key], 0.5)


AVERAGES = (
    average_by_data,
    average_by_foreach,
    average_by_copies,
    average_by_loading,
    average_by_state_dict,
)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_teacher_that_follows_a_student_step_by_step(average, rng):
    """Neither train() nor eval() is called in between, which would drop what was folded."""
    student, teacher = encoder_of(ON_KERNELS[0]), encoder_of(ON_KERNELS[0]).requires_grad_(False)
    patches = torch.randn(2, 768, generator=rng)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    before = features_of(teacher, patches)
    for _ in range(2):
        for parameter in student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
        average(teacher, student)
        got = features_of(teacher, patches)
        expected = features_of(on("eager", copy.deepcopy(teacher)), patches)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (got - before).abs().max() > 0.1
        before = got


@pytest.mark.parametrize("how", ["mean", "ema", "ema of buffers too"])
def test_torchs_averaged_model(how, rng):
    swa = torch.optim.swa_utils
    multi = None if how == "mean" else swa.get_ema_multi_avg_fn(0.5)
    student = encoder_of(ON_KERNELS[0])
    teacher = swa.AveragedModel(student, multi_avg_fn=multi, use_buffers="buffers" in how)
    patches = torch.randn(2, 768, generator=rng)
    for _ in range(3):
        teacher.update_parameters(student)
        got = features_of(teacher, patches)
        expected = features_of(on("eager", copy.deepcopy(teacher.module)), patches)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng))


def flipped(stock):
    return lambda *args, **kwargs: stock(*args, **kwargs).flip(-1)


PATCHED = (
    nn.Linear, nn.LayerNorm, layers.QKVLinear, layers.QKVBias, layers.LayerScale,
    layers.EncoderAttention, layers.EncoderMLP, layers.EncoderLayer, type(ACT2FN["gelu"]),
)  # fmt: skip


@pytest.mark.parametrize("recording", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("kind", PATCHED, ids=lambda kind: kind.__name__)
def test_a_class_whose_call_is_replaced_is_called(kind, name, recording, monkeypatch):
    """As tools patch classes: on the kernels as in eager."""
    encoder = encoder_of(ON_KERNELS[0])
    patches = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    plain = features_of(on("eager", encoder), patches, recording=recording)
    monkeypatch.setattr(kind, name, flipped(getattr(kind, name)))
    patched, on_kernels = (
        features_of(on(backend, encoder), patches, recording=recording)
        for backend in ("eager", "triton")
    )
    assert not torch.allclose(patched, plain, atol=1e-3)
    torch.testing.assert_close(on_kernels, patched, rtol=1e-4, atol=1e-4)
