"""The round in transformers' Llama: golden traces, plain text, and what it refuses."""

import json
from functools import cache

import check
import pytest
import torch
from numpy_decode import pick

transformers = pytest.importorskip("transformers")

from transformers_round import rounds, self_speculate


def trace() -> dict:
    """The golden cases in float32: transformers' norms are, in every type."""
    load = cache(transformers.LlamaForCausalLM.from_pretrained)
    cases = []
    for case in check.committed()["cases"]:
        s, prompt, found = case["settings"], case["prompt"], list[dict]()
        model = load(check.GOLDEN / case.get("model", "model"), dtype=torch.float32)
        end = min(len(prompt) + s["max_new_tokens"], model.config.max_position_embeddings)
        eos = model.config.eos_token_id if s["eos"] is None else s["eos"]
        picks = lambda x, p: pick(x.numpy(), p, s)
        how = (s["exit_layer"], s["draft_len"], s["min_confidence"], eos, picks)
        cases.append({"name": case["name"], "prompt": prompt, "settings": s, "rounds": found})
        for r in rounds(model, prompt, end, *how):
            layers, query = r.pop("cache").layers, r.pop("exit_queries")
            found.append(r | {"logits": r["logits"].tolist()})
            if s["exit_layer"]:
                found[-1]["exit_queries"] = query.tolist()
            for kind in ("keys", "values"):
                kept = [getattr(layer, kind)[0, :, : r["length"]] for layer in layers]
                cases[-1][kind] = torch.stack(kept).tolist()
    return {"format": "layerskip-trace-1", "dtype": "float32", "cases": cases}


def test_its_trace_keeps_every_rule():
    report = check.check(json.loads(json.dumps(trace())))
    assert report.broken is None, str(report.broken)
    assert not report.not_given["cases"]
    rows = ("logits", "exit_queries", "keys", "values")
    assert all(report.compared[k] == report.golden[k] for k in rows)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, vocab_size=97)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    config = transformers.LlamaConfig(**shape, **heads, attn_implementation=request.param)
    config.bos_token_id = config.eos_token_id = None
    config.initializer_range = 0.15
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers[2:]:  # so that exits foresee some of the text
        layer.self_attn.o_proj.weight.data *= 0.3
        layer.mlp.down_proj.weight.data *= 0.3
    model.generation_config.pad_token_id = 0
    return model


def generate(model, prompt, **how):
    ids = torch.tensor([prompt])
    return model.generate(ids, do_sample=False, **{"max_new_tokens": 24, **how})[0].tolist()


@pytest.mark.parametrize("exit_layer", [1, 5])
def test_greedy_text_is_its_own_plain_text(model, exit_layer):
    ours = dict(custom_generate=self_speculate, exit_layer=exit_layer, draft_len=5)
    for prompt in ([3], [96, 5, 5, 17, 40, 2, 9]):
        plain = generate(model, prompt)
        assert generate(model, prompt, **ours) == plain
    eos = plain[len(prompt) + 9]
    for ids in (eos, [eos, 0]):
        stopped = plain[: plain.index(eos, len(prompt)) + 1]
        assert generate(model, prompt, eos_token_id=ids, **ours) == stopped
    made = [len(r["emitted"]) for r in rounds(model, [1, 2, 3], 27, exit_layer, 5)]
    assert len(made) < sum(made) == 24  # drafts were accepted


def test_no_layer_runs_twice_for_a_row(model, monkeypatch):
    runs = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def counted(h, number=number, forward=layer.forward, **how):
            runs[number] += h.shape[1]
            return forward(h, **how)

        monkeypatch.setattr(layer, "forward", counted)
    found = list(rounds(model, [1, 2, 3], 23, 2, 5))
    rows = sum(len(r["drafted"]) + 1 for r in found)
    assert runs == [rows + 2] * 6  # and two of prefill


@pytest.mark.parametrize("how", [
    dict(do_sample=True),
    dict(repetition_penalty=1.5),
    dict(exit_layer=6),
    dict(exit_layer=0),
    dict(attention_mask=torch.tensor([[0, 1, 1]])),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(model, how):
    how = dict(custom_generate=self_speculate, exit_layer=2, do_sample=False) | how
    with pytest.raises(ValueError, match=r"sequence|exit_layer|padded"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, **how)
    with pytest.raises(ValueError, match="one sequence"):
        model.generate(torch.tensor([[1], [2]]), custom_generate=self_speculate, exit_layer=2)


def test_stopping_criteria_are_heard(model):
    class Stop(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **how):
            return torch.tensor([ids.shape[1] > 10])

    ours = dict(custom_generate=self_speculate, exit_layer=2, draft_len=5)
    found = generate(model, [1, 2, 3], stopping_criteria=[Stop()], **ours)
    assert 10 < len(found) <= 10 + 6
