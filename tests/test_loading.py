"""Every layout of a checkpoint gives the same model: Meta's native one, tokenizers of all kinds, rope of all kinds."""

import base64
import json

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from oracle import oracle_logits
from safetensors.torch import save_file

from decode import generate
from model import META_NAMES, CheckpointError, Config, load_checkpoint, rotary_frequencies, save_checkpoint
from tokenizer import Tokenizer

TO_META = {hf.removeprefix("model."): meta for meta, hf in META_NAMES.items()}
PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}


def meta_config(tied=False, **changes) -> Config:
    return Config.from_params(json.dumps({**PARAMS, **changes}), vocab_size=64, tied=tied)


def write_meta(model, path, shards: int, embedding_dim: int, **changes) -> None:
    """Writes the model as Meta does: interleaved rotary pairs, row-parallel and column-parallel shards."""
    path.mkdir()
    (path / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    files = [{"rope.freqs": torch.ones(2)} for _ in range(shards)]
    for name, p in model.named_parameters():
        weight, inner = p.detach(), name.removeprefix("model.").removesuffix(".weight")
        layer = ""
        if inner.startswith("layers."):
            _, number, inner = inner.split(".", 2)
            layer = f"layers.{number}."
        if inner.endswith(("q_proj", "k_proj")):  # half-split to interleaved
            half = model.config.head_dim // 2
            weight = weight.view(-1, 2, half, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        split = embedding_dim if inner == "embed_tokens" else 1 if inner.endswith(("o_proj", "down_proj")) else 0
        parts = [weight] * shards if weight.dim() == 1 else weight.chunk(shards, split)
        for file, part in zip(files, parts, strict=True):
            file[f"{layer}{TO_META[inner]}.weight"] = part.contiguous()
    for number, file in enumerate(files):
        save_file(file, path / f"consolidated.{number:02}.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (4, 1), (4, 0), (2, 1)])
def test_metas_layout_in_any_number_of_shards_is_bitwise_the_hugging_face_form(tmp_path, shards, embedding_dim, tied):
    model = tiny_model(meta_config(tied=tied), dtype=torch.bfloat16)
    write_meta(model, tmp_path / "meta", shards, embedding_dim)
    save_checkpoint(model, tmp_path / "hf")
    ours, theirs = load_checkpoint(tmp_path / "meta"), load_checkpoint(tmp_path / "hf")
    assert ours.config == theirs.config == model.config
    tokens = torch.randint(64, (2, 30))
    assert torch.equal(ours(tokens), theirs(tokens)) and torch.equal(ours(tokens), model(tokens))


def test_interleaved_and_half_split_rotary_are_the_same_function(tmp_path):
    """Against Meta's own formula, complex multiplication of neighbouring pairs, in NumPy."""
    model = tiny_model(meta_config(), dtype=torch.float64)
    c, x = model.config, torch.randn(5, model.config.dim, dtype=torch.float64)
    write_meta(model, tmp_path / "meta", 1, 0)
    half_split = model.model.layers[0].self_attn.q_proj.weight.detach()
    half = c.head_dim // 2
    interleaved = half_split.view(-1, 2, half, c.dim).transpose(1, 2).reshape(half_split.shape)
    angle = np.arange(5)[:, None] * rotary_frequencies(c).double().numpy()
    q = (x @ interleaved.T).view(5, c.n_heads, half, 2).numpy()
    turned = (q[..., 0] + 1j * q[..., 1]) * np.exp(1j * angle)[:, None]
    from model import rotate

    cos, sin = model.rotary(0, 5)
    ours = rotate((x @ half_split.T).view(5, c.n_heads, c.head_dim), cos, sin).numpy()
    assert np.allclose(ours[..., :half], turned.real, atol=1e-6) and np.allclose(ours[..., half:], turned.imag, atol=1e-6)


def test_metas_parameters_give_the_published_shapes():
    llama2_7b = dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5)
    llama2_70b = dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5)
    llama3_8b = dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=5e5)
    llama32_1b = dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, multiple_of=256, ffn_dim_multiplier=1.5, norm_eps=1e-5, rope_theta=5e5, use_scaled_rope=True)
    shapes = [Config.from_params(json.dumps(p), 32000, False) for p in (llama2_7b, llama2_70b, llama3_8b, llama32_1b)]
    assert [c.hidden_dim for c in shapes] == [11008, 28672, 14336, 8192]
    assert [c.n_kv_heads for c in shapes] == [32, 8, 8, 8]
    assert [(c.rope_type, c.rope_factor, c.max_len) for c in shapes[2:]] == [("default", 1.0, 8192), ("llama3", 32.0, 131072)]


META_BAD = {
    "a missing shard": lambda d: (d / "consolidated.02.safetensors").unlink(),
    "no shards": lambda d: [f.unlink() for f in d.glob("consolidated*")],
    "only pickles": lambda d: [f.rename(f.with_suffix(".pth")) for f in d.glob("consolidated*")],
    "no dim": lambda d: (d / "params.json").write_text(json.dumps({k: v for k, v in PARAMS.items() if k != "dim"})),
    "not JSON": lambda d: (d / "params.json").write_text("[1"),
    "multiple of 0": lambda d: (d / "params.json").write_text(json.dumps({**PARAMS, "multiple_of": 0})),
    "quantised": lambda d: (d / "params.json").write_text(json.dumps({**PARAMS, "quantization_args": {"scheme": "int4"}})),
    "a shard of another model": lambda d: save_file({"norm.weight": torch.ones(3)}, d / "consolidated.03.safetensors"),
}


@pytest.mark.parametrize("fault", META_BAD)
def test_a_bad_directory_in_metas_layout_is_refused_in_one_line(tmp_path, fault):
    write_meta(tiny_model(meta_config()), tmp_path / "meta", 4, 1)
    META_BAD[fault](tmp_path / "meta")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path / "meta")
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Rope


@pytest.mark.parametrize("changes", [
    dict(rope_type="linear", rope_factor=4.0),
    dict(rope_type="llama3", rope_factor=8.0, rope_original_len=32, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0),
])  # fmt: skip
def test_scaled_rope_survives_saving_and_changes_the_model(tmp_path, changes):
    model = tiny_model(tiny_config(head_dim=16, **changes), dtype=torch.float64)
    save_checkpoint(model, tmp_path)
    loaded, tokens = load_checkpoint(tmp_path), torch.randint(61, (1, 100))
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    unscaled = tiny_model(tiny_config(head_dim=16), dtype=torch.float64)
    assert not torch.allclose(unscaled(tokens)[0, -1], model(tokens)[0, -1], atol=1e-3)
    drafted = [t for r in generate(loaded, tokens[0].tolist(), exit_layer=2, max_new_tokens=20, eos=()) for t in r.emitted]
    assert drafted == [t for r in generate(loaded, tokens[0].tolist(), max_new_tokens=20, eos=()) for t in r.emitted]


def test_llama3_rope_keeps_fast_pairs_and_slows_slow_ones():
    c = tiny_config(head_dim=64, rope_theta=5e5, rope_type="llama3", rope_factor=8.0, rope_original_len=8192)
    scaled, plain = rotary_frequencies(c), rotary_frequencies(tiny_config(head_dim=64, rope_theta=5e5))
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.equal(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_the_oracle_agrees_at_another_theta_and_head_dim():
    config = tiny_config(head_dim=6, rope_theta=5e5, n_heads=6, n_kv_heads=3)
    model = tiny_model(config, dtype=torch.float64)
    weights, tokens = {n: p.detach().numpy() for n, p in model.state_dict().items()}, list(range(40))
    assert np.allclose(model(torch.tensor([tokens])).detach().numpy()[0], oracle_logits(weights, config, tokens), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture
def fast(tmp_path):
    """A byte-level BPE tokenizer.json with a BOS template, as Llama 3's."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    model = Fast(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    model.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_json_encodes_with_its_own_bos_and_gives_back_the_text(fast):
    tokenizer = Tokenizer(fast)
    ids = tokenizer.encode(" the  fox 漢😀\n")
    assert ids[0] == tokenizer.bos == 0 and tokenizer.decode(ids) == " the  fox 漢😀\n"
    assert tokenizer.encode("fox", bos=False) == tokenizer.encode("fox")[1:] and tokenizer.vocab_size > max(ids)


def test_tiktokens_format_is_told_apart(fast):
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (fast / "tokenizer.model").write_text(ranks)
    assert Tokenizer(fast).bos == 0, "tokenizer.json beside it is used"
    (fast / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tiktoken"):
        Tokenizer(fast)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_bad_tokenizer_json_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError) as refused:
        Tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
