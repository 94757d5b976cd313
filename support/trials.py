"""Trials: does this machine give a row the same bits, whatever else is in its pass?

A library's order of summation is not documented, and changes with the processor. So `exact.pack`
tries it. With random inputs a changed order alters 1 bfloat16 result in 5,000. The inputs here
cancel: each exact result is 0, and what is computed is rounding errors alone, which nearly all
change with the order.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def keeps_apart(operation: Callable[[Tensor], Tensor], least: int, most: int) -> bool:
    """Whether rows have the same bits among `least` to `most` rows, at any place.

    operation(numbers (T,)) is the result (T, ...) of a pass of the rows with these numbers.
    """
    numbers = torch.arange(most)
    whole = operation(numbers)
    for rows in range(most, least - 1, -1):
        for by in (0, 1, 2, most // 2, most - 1):
            some = numbers.roll(by)[:rows]
            if not torch.equal(operation(some), whole[some]):
                return False
    return True


def paired(shape: tuple[int, ...], sign: int, order: Tensor, generator: torch.Generator) -> Tensor:
    """(x, sign x) for random x, in an order (n,): (*shape, n), float64.

    A sum of products of such with sign 1 and -1 is 0, but for rounding errors.
    """
    x = torch.randn(*shape, len(order) // 2, generator=generator, dtype=torch.float64)
    return F.pad(torch.cat([x, sign * x], -1), (0, len(order) % 2))[..., order]


def safe_rows(way: Callable[[Tensor], Callable], weight: Tensor, most: int) -> int:
    """The least of 1, 2, 4, ... `most` such that way(weight) keeps so many rows and more apart.

    0 if there is none. weight (out, in); a head, which is long, is tried as it is.
    """
    out_features, in_features = weight.shape
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(in_features, generator=generator)
    draw = lambda rows, sign: paired(rows, sign, order, generator).to(weight.device, weight.dtype)
    product = way(weight if out_features > 1 << 14 else draw((out_features,), -1))
    inputs = [draw((most,), 1) for _ in range(1 + 64 // out_features)]  # narrow: more
    for least in (1 << n for n in range(most.bit_length())):
        if all(keeps_apart(lambda rows: product(x[rows]), least, most) for x in inputs):
            return least
    return 0


def loud_attention(
    rows: int,
    view: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, H, hd), k and v (1, Hkv, view, hd) whose scores are rounding errors, near 1.

    So all positions weigh nearly the same, and the mixed values nearly cancel. heads is
    (H, Hkv, hd).
    """
    generator, size = torch.Generator().manual_seed(view), heads[2]
    loud = 0.1 / torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # errors near 1
    dims, places = (torch.randperm(n, generator=generator) for n in (size, view))
    q = loud * paired((rows, heads[0]), 1, dims, generator)
    k = paired((1, heads[1], view), -1, dims, generator)
    v = paired((1, heads[1], size), -1, places, generator).transpose(2, 3)
    q, k, v = (x.to(device, dtype).contiguous() for x in (q, k, v))
    return q, k, v
