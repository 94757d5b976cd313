"""Self-speculation against plain decoding: speedup, drafters."""

from argparse import Namespace
from collections.abc import Iterable
from functools import partial

import torch

from bench.common import Table, Works, compare, decode_all, engine, progress, target, title
from decode import Sampling
from exact import pack
from extras.drafters import DRAFTERS, SkipLayers, parse_drafter, search_skips
from extras.lens import choose_exit


def drafted_table(t: Namespace, who: dict[str, dict], temperature: float = 0.0) -> Table:
    """Plain decoding, and drafting with the settings of `who`, which may name a model of its own.

    Plain decoding is exact in --dtype, not exact, and exact in another type; with --compile, exact
    in --dtype, and compiled. Drafting is compiled then, and must write the compiled plain text.
    """
    models, ours = {"plain": pack(t.load(t.dtype))}, "plain"
    if t.compile:
        ours = "plain, compiled"
        models[ours] = engine(t, t.load(t.dtype), compiled=True)
    else:
        other = torch.bfloat16 if t.dtype == torch.float32 else torch.float32
        models["plain, not exact"] = t.load(t.dtype)
        models[f"plain, {str(other)[6:]}"] = pack(t.load(other))
    how: dict = dict(prompts=t.prompts, count=t.tokens, eos=t.eos, sampling=Sampling(temperature))
    works: Works = {n: partial(decode_all, model=model, **how) for n, model in models.items()}
    works |= {name: partial(works[ours], **settings) for name, settings in who.items()}
    same = dict.fromkeys(who, ours)
    return title(t, f"temperature {temperature}"), compare(works, t.runs, same)


def speedup(args: Namespace) -> list[Table]:
    """Self-speculation against the fastest plain decoding, greedy and at temperature 0.8.

    --drafter adds other drafters, by decode.py's names for them.
    """
    t = target(args)
    who = {"drafted": t.settings, **named(t, t.drafter)}
    return [drafted_table(t, who, temperature) for temperature in (0.0, 0.8)]


def named(t: Namespace, drafters: Iterable[str]) -> dict[str, dict]:
    """Settings of generate for drafters by name."""
    raw, base = t.load(t.dtype), t.settings
    return {who: base | parse_drafter(who, raw, base["exit_layer"]) for who in drafters}


def drafters(args: Namespace) -> list[Table]:
    """Every drafter on one checkpoint, greedy and at temperature 0.8, against plain decoding.

    --drafter adds model:DIR and kangaroo:DIR. What `exit auto` reads of a prompt beforehand and the
    search for sublayers to skip, on other prompts, are not timed.
    """
    t, texts = target(args), torch.tensor(target(args, part=1).prompts)
    raw, base = t.load(t.dtype), t.settings
    show = lambda number, *_: progress(f"search {number} of {t.tries}")
    attention, mlp, _ = search_skips(raw, texts, t.tries, on_try=show)
    who = {"early exit": base}
    if not t.compile:  # graphs are of one exit
        chosen = [choose_exit(raw, prompt, base) for prompt in t.prompts]
        auto = {name: [one[name] for one in chosen] for name in ("exit_layer", "draft_len")}
        who["exit auto"] = {**base, **auto}
    alone = [form for form, _ in DRAFTERS.values() if ":" not in form and form != "exit"]
    who |= named(t, [*alone, *t.drafter])
    skip = dict(exit_layer=0, drafter=partial(SkipLayers, attention=attention, mlp=mlp))
    who[f"skip {len(attention)} attention, {len(mlp)} MLP"] = {**base, **skip}
    return [drafted_table(t, who, temperature) for temperature in (0.0, 0.8)]
