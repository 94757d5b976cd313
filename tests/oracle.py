"""An independent Llama in NumPy float64: no torch, no cache, all recomputed for every token.

Written from the papers and the Hugging Face parameter names; it shares no line with model.py.
"""

import numpy as np


def oracle_logits(weights: dict[str, np.ndarray], config, tokens: list[int]) -> np.ndarray:
    """Logits (T, vocab) for each position of `tokens`."""
    weights = {name.removeprefix("model."): w for name, w in weights.items()}
    length, head_dim = len(tokens), config.head_dim
    h = weights["embed_tokens.weight"][np.array(tokens)]

    def norm(x, name):
        mean_square = (x * x).mean(-1, keepdims=True)
        return weights[name + ".weight"] * x / np.sqrt(mean_square + config.norm_eps)

    def linear(x, name):
        return x @ weights[name + ".weight"].T

    def rope(x):  # (T, heads, head_dim): the first half of each head is paired with the second
        frequency = 1.0 / config.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
        turn = np.exp(1j * np.arange(length)[:, None] * frequency)[:, None, :]
        half = head_dim // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    for i in range(config.n_layers):
        at = f"layers.{i}."
        x = norm(h, at + "input_layernorm")
        q, k, v = (
            linear(x, f"{at}self_attn.{name}_proj").reshape(length, -1, head_dim) for name in "qkv"
        )
        q, k = rope(q), rope(k)
        mixed = np.zeros((length, config.n_heads, head_dim))
        for head in range(config.n_heads):
            shared = head * config.n_kv_heads // config.n_heads
            for t in range(length):
                score = k[: t + 1, shared] @ q[t, head] / np.sqrt(head_dim)
                probability = np.exp(score - score.max())
                mixed[t, head] = (probability / probability.sum()) @ v[: t + 1, shared]
        h = h + linear(mixed.reshape(length, -1), at + "self_attn.o_proj")
        x = norm(h, at + "post_attention_layernorm")
        gate = linear(x, at + "mlp.gate_proj")
        up = linear(x, at + "mlp.up_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")
    head = weights["embed_tokens.weight" if config.tied else "lm_head.weight"]
    return norm(h, "norm") @ head.T
