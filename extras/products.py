"""Matrix products of compiled decoding at the memory's speed: Inductor's C++ template, changed.

The bits stay: each sum still runs over the inputs in order. Where another version of PyTorch has
other text, that text stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

LOOP, WEIGHTS = "for (int k = 0; k < K; ++k) {", "B + k * ldb + col * VLEN"
CHANGES = {
    # Read ahead: processors stop at the end of a page of memory.
    LOOP: f"{LOOP} __builtin_prefetch(B + (k + 64) * ldb);",
    # Half a vector of bfloat16 goes straight to a register (AVX2).
    f"auto b = VectorizedIn::loadu({WEIGHTS}, VLEN)": f"Vectorized b; load_to_float({WEIGHTS}, b)",
}
BLOCK_ROWS = 4  # GCC 12 keeps the sums of more rows in memory (AVX-512)


@contextmanager
def faster_products() -> Iterator[None]:
    """What is compiled in here has the changed products."""
    import_module("torch._inductor.select_algorithm")  # the next module needs it first
    gemm: Any = import_module("torch._inductor.codegen.cpp_micro_gemm")
    kernel, configs = gemm.CppMicroGemmFP32Vec, gemm.micro_gemm_configs
    text = kernel.TEMPLATE_KERNEL
    for old, new in CHANGES.items():
        text = text.replace(old, new)
    blocks = (c.register_blocking._replace(block_m=BLOCK_ROWS) for c in configs[kernel])
    changed = [replace(c, register_blocking=b) for c, b in zip(configs[kernel], blocks)]
    with patch.object(kernel, "TEMPLATE_KERNEL", text), patch.dict(configs, {kernel: changed}):
        yield
