"""An independent Llama in NumPy float64: no torch, no cache, everything recomputed from scratch for every token.

Written from the papers and the Hugging Face parameter names alone; it shares no line with model.py.
"""

import numpy as np


def oracle_logits(weights: dict[str, np.ndarray], config, tokens: list[int], depth: int | None = None) -> np.ndarray:
    """Logits (T, vocab) after `depth` layers (default: all) for each position of `tokens`."""
    length, head_dim = len(tokens), config.head_dim
    h = weights["model.embed_tokens.weight"][np.array(tokens)]

    def norm(x, name):
        return weights[name] * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)

    def rope(x):  # (T, heads, head_dim); the first half of each head is paired with the second
        frequency = 1.0 / config.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
        angle = np.arange(length)[:, None] * frequency
        turn = np.exp(1j * angle)[:, None, :]
        half = head_dim // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], -1)

    for i in range(config.n_layers if depth is None else depth):
        at = f"model.layers.{i}."
        x = norm(h, at + "input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{at}self_attn.{name}_proj.weight"].T).reshape(length, -1, head_dim) for name in "qkv"
        )
        q, k = rope(q), rope(k)
        mixed = np.zeros((length, config.n_heads, head_dim))
        for head in range(config.n_heads):
            shared = head * config.n_kv_heads // config.n_heads
            for t in range(length):
                score = k[: t + 1, shared] @ q[t, head] / np.sqrt(head_dim)
                probability = np.exp(score - score.max())
                mixed[t, head] = (probability / probability.sum()) @ v[: t + 1, shared]
        h = h + mixed.reshape(length, -1) @ weights[at + "self_attn.o_proj.weight"].T
        x = norm(h, at + "post_attention_layernorm.weight")
        gate = x @ weights[at + "mlp.gate_proj.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return norm(h, "model.norm.weight") @ head.T


def oracle_greedy(weights: dict[str, np.ndarray], config, prompt: list[int], count: int, depth: int | None = None) -> list[int]:
    """`count` greedy tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle_logits(weights, config, tokens, depth)[-1].argmax()))
    return tokens[len(prompt) :]
