"""LayerSkip's round in transformers' own LlamaForCausalLM and StaticCache.

    from transformers_round import self_speculate
    model.generate(**inputs, custom_generate=self_speculate, exit_layer=6, draft_len=8)

One sequence, greedy, one cache; no layer runs twice for a token. Numbers are rules of SPEC.md.

    python porting/transformers_round.py DIR    speed beside assistant_early_exit
"""

import argparse
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache, logging


def run_layers(model: Any, h: Tensor, first: int, last: int, cache: Any, start: int) -> Tensor:
    """Layers [first, last) on rows h (1, T, dim) at positions from start."""
    positions = torch.arange(start, start + h.shape[1], device=h.device)
    seen = torch.arange(cache.layers[0].max_cache_len, device=h.device) <= positions[:, None]
    mask = torch.finfo(h.dtype).min * (~seen)[None, None].to(h.dtype)  # (1, 1, T, S): 3.3
    angles = model.model.rotary_emb(h, positions[None])
    for layer, store in zip(model.model.layers[first:last], cache.layers[first:last]):
        store.cumulative_length.fill_(start)  # where it writes; the rest is dead
        h = layer(h, attention_mask=mask, past_key_values=cache, position_embeddings=angles)
    return h


def unembed(model: Any, h: Tensor) -> Tensor:
    """Logits (T, V) of rows h (1, T, dim)."""
    return model.lm_head(model.model.norm(h))[0]


@torch.inference_mode()
def rounds(
    model: Any,
    tokens: list[int],
    end: int,
    exit_layer: int,
    draft_len: int,
    min_confidence: float = 0.0,
    eos: Collection[int] = (),
    pick: Callable = lambda logits, position: int(logits.argmax()),  # 4.2
) -> Iterator[dict]:
    """Decodes after tokens, to `end` of them. Yields rounds as in 10.2, with tensors."""
    layers = model.config.num_hidden_layers
    cache = StaticCache(config=model.config, max_cache_len=max(end - 1, 1))
    embed = lambda ids: model.model.embed_tokens(torch.tensor([ids], device=model.device))
    tokens, length = list(tokens), len(tokens) - 1
    if length:
        run_layers(model, embed(tokens[:-1]), 0, layers, cache, 0)  # 6.2
    while len(tokens) < end:
        n, queries, drafted = len(tokens), [embed(tokens[-1:])], list[int]()
        limit = min(draft_len, end - n - 1) if exit_layer else 0  # 5.0
        while exit_layer:  # 5.1
            row = len(drafted)
            queries[row] = run_layers(model, queries[row], 0, exit_layer, cache, length + row)
            if row == limit or (drafted and drafted[-1] in eos):
                break
            logits = unembed(model, queries[row])[0]
            if min_confidence > 0 and logits.float().softmax(-1).max() <= min_confidence:
                break
            drafted.append(pick(logits, n + row))
            queries.append(embed(drafted[-1:]))
        query = torch.cat(queries, 1)  # (1, k + 1, dim)
        logits = unembed(model, run_layers(model, query, exit_layer, layers, cache, length))  # 5.2
        emitted: list[int] = []
        for row, foreseen in enumerate([*drafted, None]):  # 5.3
            emitted.append(pick(logits[row], n + row))
            if emitted[-1] != foreseen or emitted[-1] in eos:
                break
        accepted = sum(a == b for a, b in zip(drafted, emitted))
        r = dict(drafted=drafted, accepted=accepted, emitted=emitted, start=length)
        length += len(emitted)  # 5.4
        tokens += emitted
        yield r | dict(length=length, exit_queries=query[0], logits=logits, cache=cache)
        if emitted[-1] in eos:
            return


def self_speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: Any = None,
    exit_layer: int = 0,
    draft_len: int = 8,
    min_confidence: float = 0.0,
    **model_kwargs: Any,
) -> Tensor:
    """For custom_generate. Returns ids (1, n). Raises ValueError for what it cannot do."""
    c, mask = generation_config, model_kwargs.get("attention_mask")
    if len(input_ids) > 1 or c.do_sample or len(logits_processor):
        raise ValueError("one sequence, greedy, without logits processors")
    if mask is not None and not mask.all():
        raise ValueError("a padded prompt is refused")
    if not 0 < exit_layer < model.config.num_hidden_layers:
        raise ValueError("exit_layer must be above 0 and below the number of layers")
    one = c.eos_token_id
    eos = one if isinstance(one, list) else [] if one is None else [one]
    tokens, how = input_ids[0].tolist(), (exit_layer, draft_len, min_confidence, eos)
    for r in rounds(model, tokens, c.max_length, *how):
        tokens = tokens + r["emitted"]
        ids = input_ids.new_tensor([tokens])
        if any(criterion(ids, None).all() for criterion in stopping_criteria):
            break
    return input_ids.new_tensor([tokens])


def compare(model: Any, exit_layer: int, draft_len: int, count: int, prompts: int) -> None:
    """Speed and texts of transformers and of this round, in turns."""
    torch.manual_seed(0)
    start = torch.tensor([[model.config.bos_token_id or 0]])
    model.generation_config.num_assistant_tokens_schedule = "constant"
    theirs = dict(assistant_early_exit=exit_layer, num_assistant_tokens=draft_len)
    ours = dict(custom_generate=self_speculate, exit_layer=exit_layer, draft_len=draft_len)
    ways: dict[str, Any] = {"plain": {}, "assistant_early_exit": theirs, "self_speculate": ours}
    seconds, made, same = (dict.fromkeys(ways, 0.0) for _ in range(3))
    for number in range(prompts + 1):  # 0 warms up
        ids, outs = model.generate(start, do_sample=True, max_new_tokens=32), []
        for name, how in ways.items():
            began = time.perf_counter()
            outs.append(model.generate(ids, do_sample=False, max_new_tokens=count, **how))
            if number:
                seconds[name] += time.perf_counter() - began
                made[name] += outs[-1].shape[1] - ids.shape[1]
                same[name] += torch.equal(outs[-1], outs[0])
    speeds = {name: made[name] / seconds[name] for name in ways}
    for name, speed in speeds.items():
        ratio = speed / speeds["assistant_early_exit"]
        print(f"{name:20}{speed:6.1f} tokens/s, ratio {ratio:.2f}, {same[name]:.0f} texts as plain")


def main() -> None:
    p = argparse.ArgumentParser(description=compare.__doc__)
    p.add_argument("ckpt", metavar="DIR", help="a Llama")
    for name, default in (("exit", 6), ("draft", 8), ("tokens", 128), ("prompts", 3)):
        p.add_argument(f"--{name}", type=int, default=default)
    args = p.parse_args()
    logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(args.ckpt, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    compare(model, args.exit, args.draft, args.tokens, args.prompts)


if __name__ == "__main__":
    main()
