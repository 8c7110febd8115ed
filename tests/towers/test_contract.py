"""Every attention of the installed transformers that takes cu_seqlens: as stock, once swapped."""

import copy

import pytest
import torch

import hrvlm
from hrvlm.towers.packed_attention import obstacle
from tests.numerics import relative_error
from tests.towers.attention_classes import attention_classes, build, inputs

LENGTHS = (7, 1, 24, 24, 5)
# Classes that can't be swapped, each with its reason.
EXCEPT: dict[str, str] = {}


def run(module, given, cotangent):
    """Output, and the gradients of the input and of the weights."""
    given = {**given, "hidden_states": given["hidden_states"].clone().requires_grad_()}
    module.zero_grad()
    out = module(**given)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(cotangent[: out.numel()].view_as(out))
    return [out.detach(), given["hidden_states"].grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(("model", "name"), attention_classes())
def test_forward_and_gradients_equal_stock(model, name):
    module = build(model, name)
    if name in EXCEPT:
        with pytest.raises(ValueError, match=EXCEPT[name]):
            hrvlm.accelerate(module)
        return
    given = inputs(module, LENGTHS)
    cotangent = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    expected = run(module, given, cotangent)
    swapped = copy.deepcopy(module)
    report = hrvlm.accelerate(swapped)
    assert [part.cls for part in report.swapped] == [name] and not report.left_alone
    assert type(swapped(**given)) is type(module(**given))
    for mine, theirs in zip(run(swapped, given, cotangent), expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or relative_error(mine, theirs) <= 1e-6
    assert type(hrvlm.restore(swapped)) is type(module)


def test_the_table_is_whole():
    """24 vision classes and three for audio in transformers 5.17; more since."""
    assert len(attention_classes()) >= 27
    refused = {name for model, name in attention_classes() if obstacle(type(build(model, name)))}
    assert refused == EXCEPT.keys()
