"""The KVQ cache: one store of keys, values and exit queries for drafting and verification.

Draft and verifier are layers of the same model, so there is one key/value store, not two. The draft
leaves in it K and V of layers [0, E), and the hidden state that enters layer E for each of its
rows: the exit query. The verifier starts from those, so layers [0, E) never run twice for a token
(LayerSkip, arXiv 2404.16710, section 4.3).

Everything is allocated once. A rejected token is forgotten by not moving `length` past it: nothing
is copied or concatenated. What lies beyond `length` is dead and will be overwritten.

               position   0 . . . . . . . . . . length . . . . . . . max_len
    K, V  layer 0         [ live in all layers ][ draft rows of layers < E ]   dead
          ...
          layer L-1       [ live in all layers ][ written by verification  ]   dead
    Q     exit queries, by row of the draft     [ row 0 .. row draft_len   ]
"""

import torch
from torch import Tensor

VIEW = 64  # exact.py reads views of a multiple of this: a position meets the same shape always


class KVQCache:
    """Keys and values (n_layers, n_kv_heads, max_len, head_dim), exit queries (draft_len + 1, dim).

    It knows nothing of tokens or models. `max_len` is rounded up to a multiple of VIEW.
    `length` counts the positions whose keys and values are live in every layer.
    Its bytes: 2 * n_layers * max_len * n_kv_heads * head_dim * itemsize
    + (draft_len + 1) * dim * itemsize.
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
        self.max_len = self.view_len(max_len)
        # Zeros, not empty: attention gives the dead part of a view weight 0, and 0 * NaN is NaN.
        shape = (n_layers, n_kv_heads, self.max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.queries = torch.zeros(draft_len + 1, dim, dtype=dtype, device=device)
        # The same memory as (max_len, n_kv_heads, head_dim) per layer: a row is one position.
        pairs = zip(self.keys, self.values)
        self._rows = [(k.transpose(0, 1), v.transpose(0, 1)) for k, v in pairs]
        self._shared: dict[int, tuple] = {}  # see share
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the three buffers."""
        return self.keys.nbytes + self.values.nbytes + self.queries.nbytes

    @staticmethod
    def view_len(end: int) -> int:
        """Length of the view that covers positions [0, end): a function of `end` alone."""
        return -(-end // VIEW) * VIEW

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Stores k and v (T, n_kv_heads, head_dim) of one layer at positions start..start+T-1."""
        keys, values = self._rows[layer]
        keys[start : start + len(k)] = k
        values[start : start + len(v)] = v

    def read(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (n_kv_heads, end, head_dim) of one layer at positions [0, end): views."""
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def share(self, end: int, rows: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """For each layer keys and values (rows, n_kv_heads, end, head_dim), the same for every row.

        For exact.RowAttention. Views, which are kept: what is written later shows in them.
        """
        if rows not in self._shared or self._shared[rows][0] != end:
            shape = (-1, rows, -1, -1, -1)
            both = (x[:, None, :, :end].expand(shape).unbind() for x in (self.keys, self.values))
            self._shared[rows] = (end, *both)
        return self._shared[rows][1:]

    def put_query(self, row: int, query: Tensor) -> None:
        """Stores the exit query (dim,) of draft row `row`."""
        self.queries[row] = query

    def accept(self, rows: int) -> None:
        """Makes the first `rows` rows after `length` live: they have been through every layer.

        Rows beyond them stay dead: this is the rewind. Raises ValueError when they do not fit.
        """
        if not 0 <= self.length + rows <= self.max_len:
            raise ValueError(
                f"cannot accept {rows} rows after {self.length} of {self.max_len} positions"
            )
        self.length += rows

    def rewind(self, length: int) -> None:
        """Forgets positions from `length` on, in a drafter's own cache. ValueError if not live."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: {self.length} positions are live")
        self.length = length
