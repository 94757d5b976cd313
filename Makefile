# Everything from a bare clone: `make demo`, `make test`. Each makes the virtual environment when it is not there yet.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo lint test parity mutants soak twins gpu clean

demo: .venv/ready        ## a streamed completion, and the proof that it is the full model's, faster
	$(RUN) decode.py --compare

lint: .venv/ready        ## types and style, by settings in pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check mypy==2.4.1 ruff==0.17.5
	$(RUN) -m ruff check .
	$(RUN) -m mypy

test: .venv/ready        ## the whole test suite; EXAMPLES=2000 makes the property tests look further
	$(RUN) -m pytest -q tests -m threads
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests -m "not threads" -n auto --dist worksteal

parity: .venv/ready      ## logits, greedy text and saved files against transformers, over 200 random configs
	$(RUN) -m pip install --quiet --disable-pip-version-check transformers==5.23.0
	$(RUN) tests/parity.py

mutants: .venv/ready     ## plants faults in a copy of the code; each must turn its test red
	$(RUN) tests/mutants.py

soak: .venv/ready        ## 200,000 tokens, drafted and plain, token by token (about half an hour)
	$(RUN) tests/soak.py

twins: .venv/ready       ## trains a plain and a LayerSkip model alike and compares them (about an hour); goes on where it stopped
	$(RUN) docs/twins.py

gpu: .venv/ready         ## the tables of docs/engine.md on a GPU, random weights of 1B and 8B shapes, into docs/gpu.md
	for what in speedup "speedup --compile"; do $(BENCH) --device $(DEVICE); done > docs/gpu.md
	for what in roofline "roofline --compile" exactness ideal "ideal --compile" memory scale "scale --compile"; do $(BENCH) --device $(DEVICE) --shape $(SHAPES); done >> docs/gpu.md

DEVICE = cuda
SHAPES = 1b,8b
BENCH = printf '\n`python bench.py %s`\n\n' "$$what"; $(RUN) bench.py $$what

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache
