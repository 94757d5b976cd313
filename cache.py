"""The KVQ cache: one store of keys, values and exit queries for drafting and verification.

Draft and verifier are layers of the same model, so there is one key/value store, not two. The draft
leaves in it K and V of layers [0, E), and the hidden state that enters layer E for each of its
rows: the exit query. The verifier starts from those, so layers [0, E) never run twice for a token
(LayerSkip, arXiv 2404.16710, section 4.3).

Everything is allocated once. `length` stops before a rejected token, and that forgets it: nothing
is copied or concatenated. What lies beyond `length` is written in a round, and dead after it.

               position    0 . . . . . . length . . . . . . . . . . . . . max_len
    K, V  layers 0..E-1    [ live       ][ written by the draft     ]
          layers E..L-1    [ live       ][ written by verification  ]
    Q     exit queries                   [ row i: position length+i ]
"""

import torch
from torch import Tensor


class KVQCache:
    """Keys and values (n_layers, n_kv_heads, max_len, head_dim), exit queries (draft_len + 1, dim).

    It knows nothing of tokens or models. `length` counts the positions whose keys and values are
    live in every layer. query_layer[i] is the layer that queries[i] enters; 0: not drafted in this
    round.

    Bytes: 2 * n_layers * max_len * n_kv_heads * head_dim * itemsize + (draft_len + 1) * dim *
    itemsize.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        dim: int,
        max_len: int,
        draft_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.max_len, self.length = max_len, 0
        # Zeros, not empty: exact.py's attention gives dead positions weight 0, and 0 * NaN is NaN.
        shape = (n_layers, n_kv_heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.queries = torch.zeros(draft_len + 1, dim, dtype=dtype, device=device)
        self.query_layer = [0] * (draft_len + 1)
        # The same memory as (max_len, n_kv_heads, head_dim) for each layer: a row is one position.
        self._key_rows = [k.transpose(0, 1) for k in self.keys]
        self._value_rows = [v.transpose(0, 1) for v in self.values]
        self._views: tuple = (-1, (), ())

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Stores k and v (T, n_kv_heads, head_dim) of one layer at positions start..start+T-1."""
        self._key_rows[layer][start : start + len(k)] = k
        self._value_rows[layer][start : start + len(v)] = v

    def read(self, end: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For each layer keys and values (1, n_kv_heads, end, head_dim) of positions [0, end).

        They are views: what is written later shows in them. The last are kept for the next pass.
        """
        if self._views[0] != end:
            keys, values = (x[:, None, :, :end].unbind() for x in (self.keys, self.values))
            self._views = end, keys, values
        return self._views[1:]

    def commit(self, rows: int) -> None:
        """Makes the first `rows` rows after `length` live: they have been through every layer.

        Rows beyond them stay dead: that is all a rejection does. Raises ValueError where they do
        not fit.
        """
        if not 0 <= rows <= self.max_len - self.length:
            where = f"after {self.length} of {self.max_len} positions"
            raise ValueError(f"cannot commit {rows} rows {where}")
        self.length += rows
        self.query_layer = [0] * len(self.queries)

    def rewind(self, length: int) -> None:
        """Forgets positions from `length` on, in a drafter's own cache. ValueError if not live."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: {self.length} positions are live")
        self.length = length
