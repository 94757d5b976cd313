"""Compiled decoding: the same bits, drafted or not."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import reference_decode, tiny_config, tiny_model

import compiled
import model as model_module
from cache import KVQCache
from compiled import attend_widened, compile_passes, has_widened, widened_product
from decode import Sampling, generate
from drafters import AutoExit, PromptLookup
from model import CachedAttention, Layer, RowLinear, linear_product

SHAPES = {  # tails of vectors, one and several key/value heads, heads that share them
    "ragged": dict(dim=64, hidden_dim=34, n_heads=6, n_kv_heads=3, head_dim=64, max_len=150),
    "even": dict(dim=52, hidden_dim=96, n_heads=3, n_kv_heads=1, head_dim=64, max_len=150),
}


@pytest.mark.parametrize("shape, dtype", [("ragged", torch.bfloat16), ("even", torch.float32)])
def test_compiled_tokens_and_logits_are_bitwise_the_compiled_full_models(shape, dtype, monkeypatch):
    if dtype == torch.bfloat16:  # as on a machine without instructions for it
        monkeypatch.setattr(model_module, "packed_product", linear_product)
    model = tiny_model(tiny_config(n_layers=4, **SHAPES[shape]), damp_from=1, damping=0.3, dtype=dtype)
    eager, _, _ = reference_decode(model.pack(), [3, 1, 4], 100, Sampling(), ())
    compile_passes(model, [2])
    ways = [(p.shape, p.way) for p in (model.model.layers[0].self_attn.qkv, model.model.layers[0].mlp.down)]
    assert ways == [((768, 64), widened_product), ((64, 34), linear_product)] or dtype != torch.bfloat16
    monkeypatch.setattr(Layer, "forward", None)  # from here on nothing but the graphs can run
    found = set()
    for sampling in (Sampling(), Sampling(0.8, seed=3)):
        tokens, logits, _ = reference_decode(model, [3, 1, 4], 100, sampling, ())
        for how in (dict(exit_layer=2, draft_len=7), dict(exit_layer=2, draft_len=15, min_confidence=0.1), dict(draft_len=4, drafter=PromptLookup)):
            rounds = list(generate(model, [3, 1, 4], max_new_tokens=100, sampling=sampling, eos=(), **how))
            assert [t for r in rounds for t in r.emitted] == tokens
            assert torch.equal(torch.cat([r.logits for r in rounds]), logits)
            found |= {len(r.drafted) for r in rounds}
        if not sampling.temperature and dtype != torch.bfloat16:
            assert tokens == eager
    assert len(found) > 5
    with pytest.raises(ValueError, match="compiled to exit behind layers"):
        list(generate(model, [1], exit_layer=1, max_new_tokens=3, eos=()))


def test_widened_products_are_products_whose_rows_do_not_meet():
    assert has_widened()
    weight = torch.randn(20, 96).bfloat16()
    product, x = widened_product(weight), torch.randn(25, 96).bfloat16()
    whole = product(x)
    torch.testing.assert_close(whole, x @ weight.T, rtol=2**-7, atol=1e-2)
    assert torch.equal(product(x[:24].view(4, 6, 96)), whole[:24].view(4, 6, 20))
    for rows in range(1, 10):
        assert torch.equal(product(x[5 : 5 + rows]), whole[5 : 5 + rows]), rows
        assert torch.equal(product(torch.cat((x, x), 1)[:rows, 96:]), whole[:rows]), "a view"


@pytest.mark.parametrize("size", [64, 128])
def test_widened_attention_is_attention_whose_rows_do_not_meet(size):
    assert has_widened()
    q, k, v = (torch.randn(5, heads, size).bfloat16() for heads in (6, 2, 2))
    found = []
    for parts in ([0, 5], [0, 1, 2, 3, 4, 5]):
        torch.manual_seed(1)
        cache = KVQCache(3, 2, size, 8, 150, 1, torch.bfloat16)
        for kept in (cache.keys, cache.values):
            kept.normal_()
            kept[:, :, 102:] = math.nan  # nobody looks ahead
        outputs = []
        for first, last in pairwise(parts):
            compiled._attention[:] = [CachedAttention(cache, 97 + first, last - first, torch.bfloat16, True)]
            outputs.append(attend_widened(*(x[first:last] for x in (q, k, v)), 1))
        compiled._attention.clear()
        found.append(torch.cat(outputs))
        assert torch.equal(cache.keys[1, :, 97:102], k.transpose(0, 1)) and torch.equal(cache.values[1, :, 97:102], v.transpose(0, 1))
    keys, values = (x[1, :, :102].double().repeat_interleave(3, 0) for x in (cache.keys, cache.values))
    ahead = torch.arange(102) > torch.arange(97, 102)[:, None]
    weights = (q.double().transpose(0, 1) @ keys.transpose(1, 2) / size**0.5).masked_fill(ahead, -math.inf).softmax(-1)
    torch.testing.assert_close(found[0].double(), (weights @ values).transpose(0, 1), rtol=2**-8, atol=1e-5)
    assert torch.equal(*found)


def test_exit_auto_finds_its_exits_compiled(monkeypatch):
    """Pieces of one layer each; exits seen on the way do not change what is said. Packed products, which a graph calls as they are."""
    monkeypatch.setattr(RowLinear, "SMALL", 0)
    model = compile_passes(tiny_model(tiny_config(n_layers=3), damp_from=1, damping=0.3), AutoExit.choices(3, 1))
    plain = [t for r in generate(model, [3, 1], max_new_tokens=60, eos=()) for t in r.emitted]
    rounds = list(generate(model, [3, 1], max_new_tokens=60, eos=(), draft_len=15, drafter=AutoExit))
    assert [t for r in rounds for t in r.emitted] == plain and any(r.accepted for r in rounds)


def test_rows_that_a_compiler_does_not_keep_apart_are_found_out(monkeypatch):
    monkeypatch.setattr(compiled.Piece, "graph", lambda self, h, cos, sin: lambda h, cos, sin: h + h.sum() * 1e-3)
    with pytest.raises(ValueError, match="leave out --compile"):
        compile_passes(tiny_model(tiny_config()), [2])


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="exit layers lie from 1 to 2"):
        compile_passes(tiny_model(tiny_config(n_layers=3)), [3])
    with pytest.raises(ValueError, match="leave out --no-exact"):
        compile_passes(tiny_model(tiny_config()).pack(exact=False), [1])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        compile_passes(tiny_model(tiny_config(n_layers=3)), [1])
