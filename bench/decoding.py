"""Self-speculation against plain decoding: speedup, sweep, drafters."""

from argparse import Namespace
from contextlib import ExitStack
from functools import partial
from itertools import product

import torch

from bench.common import (
    ROOT,
    Table,
    Works,
    child,
    compare,
    decode_all,
    engine,
    progress,
    target,
    title,
)
from decode import Sampling
from exact import pack


def drafted_tables(t: Namespace, who: dict[str, dict], *temperatures: float) -> list[Table]:
    """Plain decoding and drafting with the settings of `who`, which must write the plain text.

    Plain decoding is exact in --dtype, not exact, exact in another type and, with --compile,
    compiled, as drafting is too.
    """
    other = torch.bfloat16 if t.dtype == torch.float32 else torch.float32
    models = {"plain": pack(t.load(t.dtype)), "plain, not exact": t.load(t.dtype)}
    models[f"plain, {str(other)[6:]}"] = pack(t.load(other))
    pairs = {name: ("plain", settings) for name, settings in who.items()}
    if t.compile:
        models["plain, compiled"] = engine(t, t.load(t.dtype), compiled=True)
        pairs |= {f"{name}, compiled": ("plain, compiled", s) for name, s in who.items()}
    tables = []
    for temperature in temperatures:
        how: dict = dict(prompts=t.prompts, count=t.tokens, sampling=Sampling(temperature))
        works: Works = {name: partial(decode_all, m, **how) for name, m in models.items()}
        for name, (plain, s) in pairs.items():
            works[name] = partial(decode_all, models[plain], **how, **s)
        rows = compare(works, t.runs, {name: plain for name, (plain, _) in pairs.items()})
        tables.append((title(t, f"temperature {temperature}"), rows))
    return tables


def speedup(args: Namespace) -> list[Table]:
    """Self-speculation against the fastest plain decoding that this code can do.

    --against DIR: this code against another checkout of it, each in a process of its own.
    """
    t = target(args)
    return against(t) if t.against else drafted_tables(t, {"drafted": t.settings}, 0.0)


DRIVER = """
import torch
from decode import generate
from model import load_checkpoint

ckpt, dtype, device, exit_layer, compiled = map(json.loads, sys.argv[1:])
model = load_checkpoint(ckpt, getattr(torch, dtype), device)
if not os.path.exists("exact.py"):  # a checkout in which generate packs by itself
    if compiled:
        from compiled import compile_passes
        compile_passes(model, [exit_layer])
elif compiled:
    from extras.compiled import compile_model
    model = compile_model(model, exit_layer)
else:
    from exact import pack
    pack(model)

def answer(prompts, how):
    started = time.perf_counter()
    rounds = (r for prompt in prompts for r in generate(model, prompt, eos=(), **how))
    return [token for r in rounds for token in r.emitted], time.perf_counter() - started
"""


def against(t: Namespace) -> list[Table]:
    """Plain and drafted decoding by this checkout against another's; equal text is no promise."""
    if not (t.against / "decode.py").is_file():
        raise ValueError(f"{t.against} is no checkout of this code: it has no decode.py")
    given = str(t.ckpt.resolve()), str(t.dtype)[6:], str(t.device), t.settings["exit_layer"]
    rows = []
    with ExitStack() as stack:
        for compiled in (False, True)[: 1 + t.compile]:
            folders = {"there": t.against, "here": ROOT}.items()
            asks = {p: child(stack, folder, DRIVER, *given, compiled) for p, folder in folders}
            for kind, settings in (("plain", {}), ("drafted", t.settings)):
                how = {**settings, "max_new_tokens": t.tokens}
                works: Works = {place: partial(ask, t.prompts, how) for place, ask in asks.items()}
                for row in compare(works, t.runs, {"here": "there"}, "there", "same text"):
                    way = f"{kind}{', compiled' * compiled}, {row['way']}"
                    rows.append({**row, "way": way})
    return [(title(t, "speedup against there"), rows)]


def sweep(args: Namespace) -> list[Table]:
    """Every exit layer x draft length against the fastest plain decoding, the fastest first.

    The prompts are not those of other commands: settings are not shown on what they were chosen on.
    """
    t = target(args, part=1)
    who = {
        f"--exit {e} --draft {d}": {**t.settings, "exit_layer": e, "draft_len": d}
        for e, d in product(t.exits, t.drafts)
    }
    ((about, rows),) = drafted_tables(t, who, 0.0)
    return [(about, sorted(rows, key=lambda row: -row["speedup"][0]))]


def drafters(args: Namespace) -> list[Table]:
    """Every drafter on one checkpoint, greedy and at temperature 0.8, against plain decoding.

    --drafter adds model:DIR and kangaroo:DIR. What `exit auto` reads of a prompt beforehand and the
    search for sublayers to skip, on other prompts, are not timed.
    """
    from extras.drafters import SkipLayers, parse_drafter, search_skips
    from extras.lens import choose_exit

    t, texts = target(args), torch.tensor(target(args, part=1).prompts)
    raw, base = t.load(t.dtype), t.settings
    show = lambda number, *_: progress(f"search {number} of {t.tries}")
    attention, mlp, _ = search_skips(raw, texts, t.tries, on_try=show)
    chosen = [choose_exit(raw, prompt, base) for prompt in t.prompts]
    auto = {name: [one[name] for one in chosen] for name in ("exit_layer", "draft_len")}
    who = {"early exit": base, "exit auto": {**base, **auto}}
    for text in ("lookup", "jacobi", *t.drafter):
        who[text] = {**base, **parse_drafter(text, raw)}
    skip = dict(exit_layer=0, drafter=partial(SkipLayers, attention=attention, mlp=mlp))
    who[f"skip {len(attention)} attention, {len(mlp)} MLP"] = {**base, **skip}
    return drafted_tables(t, who, 0.0, 0.8)
