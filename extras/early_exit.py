"""Fewer layers per token, without verification: the text is not the full model's.

LITE (arXiv 2310.18581) leaves at an exit, LayerDrop (arXiv 1909.11556) drops layers.

    python -m extras.early_exit --confidence 0.9 --exit 6
    python -m extras.early_exit --confidence 1 --keep-every 2
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from decode import check_request, new_cache, next_token
from extras.trace import parser, start
from model import Llama, prefill
from support.console import BLUE, GREEN, Show, command_errors


def keep_layers(model: Llama, layers: Iterable[int]) -> Llama:
    """A Llama of these layers alone: LayerDrop's pruning at inference (section 3.2).

    The modules are the model's own: packing one of the two packs layers of both.
    """
    kept = nn.ModuleList(model.layers[l] for l in layers)
    with torch.device("meta"):
        thin = Llama(replace(model.config, n_layers=len(kept)))
    thin.layers = kept
    thin.embed_tokens, thin.norm = model.embed_tokens, model.norm
    del thin.lm_head  # a packed head is no module, and could not replace one
    thin.lm_head, thin.row_attention = model.lm_head, model.row_attention
    return thin.train(model.training)


@torch.inference_mode()
def generate_confident(
    model: Llama, prompt_ids: list[int], confidence: float, settings: dict
) -> Iterator[tuple[int, int]]:
    """New tokens, and how many layers each ran: LITE's early exit (section 4).

    A token leaves at the first exit whose top probability is at least `confidence`: after
    exit_layer, after every eighth of the layers from there on, or at the end. The layers that it
    skips get keys and values of its last state (CALM's state propagation, arXiv 2207.07061).
    `settings` are generate's. Raises ValueError or TypeError, at the first token.
    """
    c, first, tokens = model.config, settings["exit_layer"], list(prompt_ids)
    check_request(c, tokens, first, 1, settings["max_new_tokens"])
    if not 0 < confidence <= 1:
        raise ValueError(f"the confidence must be above 0 and at most 1, not {confidence}")
    exits = [*range(max(first, 1), c.n_layers, max(1, c.n_layers // 8)), c.n_layers]
    end = min(len(tokens) + settings["max_new_tokens"], c.max_len)
    cache = new_cache(model, end, 0)
    prefill(model, cache, tokens[:-1])
    while len(tokens) < end:
        h, depth = model.embed(torch.tensor(tokens[-1:], device=model.device)), 0
        for last in exits:
            h, depth = model.run_layers(h, depth, last, cache, cache.length), last
            logits = model.unembed(h)[0]
            if logits.float().softmax(-1).max() >= confidence:
                break
        for l in range(depth, c.n_layers):
            layer, rotary = model.layers[l], model.rotary(cache.length, 1)
            _, k, v = layer.self_attn.project(layer.input_layernorm(h), *rotary)
            cache.write(l, cache.length, k, v)
        cache.commit(1)
        tokens.append(next_token(logits, len(tokens), settings["sampling"]))
        yield tokens[-1], depth
        if tokens[-1] in settings["eos"]:
            return


def main() -> None:
    p = parser("early_exit", "A token leaves at the first exit that is sure.", 128, "--prompt")
    add = p.add_argument
    add("--confidence", type=float, default=0.9, metavar="C", help="what is sure; %(default)s")
    add("--exit", type=int, dest="exit_layer", metavar="E", help="the first exit")
    add("--keep-every", type=int, default=1, metavar="N", help="drop all layers but every Nth")
    args = p.parse_args()
    with command_errors(p.prog):
        if args.keep_every < 1:
            raise ValueError(f"--keep-every must be 1 or more, not {args.keep_every}")
        model, tokenizer, ids, settings = start(args)
        model = keep_layers(model, range(0, model.config.n_layers, args.keep_every))
        last, depths, show = model.config.n_layers, [], Show(tokenizer, ids, args.prompt)
        for token, depth in generate_confident(model, ids, args.confidence, settings):
            show.put(show.stream.feed([token]), GREEN if depth < last else BLUE)
            depths.append(depth)
        show.finish()
        print(f"\n{sum(depths) / len(depths):.2f} of {last} layers per token", file=sys.stderr)


if __name__ == "__main__":
    main()
