"""`cache` and `past_key_values`: two names of one thing, whatever the release of transformers."""

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from hrvlm.vlm.output import CACHE_NAME, VLMOutput, name_cache
from tests.tiny import model_of

NAMES = ("cache", "past_key_values")
TEXT = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def model():
    return model_of().eval()


@pytest.mark.parametrize("name", NAMES)
def test_an_output_has_it_under_both_names(name):
    cache = DynamicCache()
    out = VLMOutput(logits=torch.zeros(1), **{name: cache})
    for known in NAMES:
        assert getattr(out, known) is out[known] is out.get(known) is cache and known in out
    assert list(out) == ["logits", "cache"] and out[1] is cache
    again = pytree.tree_map(lambda leaf: leaf, out)
    assert type(again) is VLMOutput and again.past_key_values is cache
    assert pickle.loads(pickle.dumps(out)).past_key_values.get_seq_length() == 0
    other = DynamicCache()
    setattr(out, name, other)
    assert out.cache is out.past_key_values is out["past_key_values"] is other
    out[name] = cache
    assert out.cache is out.past_key_values is cache


def test_an_output_without_it_has_neither_name():
    out = VLMOutput(logits=torch.zeros(1))
    assert all(getattr(out, known) is out.get(known) is None for known in NAMES)
    assert not any(known in out for known in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_goes_on_from_either_name(model, name):
    with torch.no_grad():
        whole = model(input_ids=TEXT).logits
        cache = model(input_ids=TEXT[:, :5], use_cache=True)[name]
        out = model(input_ids=TEXT[:, 5:], **{name: cache})
    assert getattr(out, name) is cache and cache.get_seq_length() == 8
    torch.testing.assert_close(out.logits, whole[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_from_either_name(model, name):
    settings = {"max_new_tokens": 3, "do_sample": False}
    alone = model.generate(input_ids=TEXT, **settings)
    with torch.no_grad():
        cache = model(input_ids=TEXT[:, :5], use_cache=True)[name]
    done = model.generate(input_ids=TEXT, **{name: cache}, return_dict_in_generate=True, **settings)
    assert torch.equal(done.sequences, alone)
    assert done[CACHE_NAME] is cache and cache.get_seq_length() == alone.shape[1] - 1


def test_both_names_at_once_are_an_error(model):
    both = dict.fromkeys(NAMES, DynamicCache())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names"):
            call(input_ids=TEXT, **both)
    assert name_cache({"cache": None, "past_key_values": None, "use_cache": True}) == {
        "use_cache": True
    }


def test_a_compiled_forward_returns_it(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(input_ids=TEXT, use_cache=True)
    assert out.past_key_values.get_seq_length() == 8
