# The only task runner: every target makes what it needs, on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
BUNDLE = bundles/pretrain_vq_ssl
RUN = $(BIN)/python -m monai.bundle run --config_file

.PHONY: demo demo-all test long label browser slurm dist package release docs figures lint type bench gpu results clean

$(BIN)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python >= 3.10 is needed, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.dev: $(BIN)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BIN)/.bench: $(BIN)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

demo: $(BIN)/.runtime  ## pretrain on generated X-rays, and see what it gains
	$(RUN) $(BUNDLE)/configs/train.json
	$(RUN) $(BUNDLE)/configs/evaluate.json --label_fraction 0.25

DEMO = runs/demo
demo-all: $(BIN)/.runtime  ## the four bundles as a chain on generated images: pretrain, classify; pretrain, segment
	rm -rf $(DEMO)
	$(RUN) bundles/pretrain_vq_ssl/configs/train.json --output_dir $(DEMO)/pretrain_vq_ssl
	$(RUN) bundles/cxr_classify/configs/train.json --output_dir $(DEMO)/cxr_classify --pretrained $(DEMO)/pretrain_vq_ssl/models/model.pt
	$(RUN) bundles/cxr_classify/configs/evaluate.json --output_dir $(DEMO)/cxr_classify
	$(RUN) bundles/hssl_multidomain/configs/train.json --output_dir $(DEMO)/hssl_multidomain
	$(RUN) bundles/seg_finetune_btcv/configs/train.json --output_dir $(DEMO)/seg_finetune_btcv --pretrained $(DEMO)/hssl_multidomain/models/model.pt
	$(RUN) bundles/seg_finetune_btcv/configs/evaluate.json --output_dir $(DEMO)/seg_finetune_btcv
	$(RUN) bundles/seg_finetune_btcv/configs/inference.json --output_dir $(DEMO)/seg_finetune_btcv
	@echo
	$(BIN)/python scripts/demo_table.py $(DEMO)

test: $(BIN)/.dev  ## the whole test suite, on all cores
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

long: $(BIN)/.dev  ## every kind of value for every knob, the documented exports, and that of a Swin transformer in 3-D
	$(BIN)/python -m pytest -m long

LABEL = .venv-label
$(LABEL)/.installed: constraints.txt scripts/label/requirements.txt scripts/label/no_dependencies.txt scripts/label/torchvision_without_cuda.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python >= 3.11 is needed for MONAI Label with these pins, this is " + sys.version.split()[0] + ": try make label PYTHON=python3.12")'
	test -x $(LABEL)/bin/python || $(PYTHON) -m venv $(LABEL)
	$(LABEL)/bin/python -m pip install --quiet --constraint constraints.txt torch monai
	$(LABEL)/bin/python -m pip install --quiet --requirement scripts/label/requirements.txt
	$(LABEL)/bin/python -m pip install --quiet --no-deps --requirement scripts/label/no_dependencies.txt
	packages=$$($(LABEL)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') && \
		cp scripts/label/torchvision_without_cuda.py $$packages && \
		echo "import torchvision_without_cuda" > $$packages/torchvision_without_cuda.pth
	touch $@

label: $(BIN)/.dev $(LABEL)/.installed  ## a real MONAI Label server with the packaged bundles, driven over REST
	LABEL_PYTHON=$(LABEL)/bin/python $(BIN)/python -m pytest -m label tests/tools/test_monai_label.py

browser: docs  ## every report and every page of the site in Chromium (Debian: apt-get install chromium)
	$(BIN)/python -m pytest -n 0 -m browser tests/tools/test_browser.py

SLURM = runs/slurm
slurm: $(BIN)/.dev  ## a real Slurm of two nodes on this machine, and jobs on it; needs root and Debian's slurm-wlm, munge
	test $$(id -u) != 0 || command -v slurmctld > /dev/null || apt-get install --yes --no-install-recommends slurm-wlm munge
	bash scripts/slurm/local.sh start $(SLURM)
	SLURM_CONF=$(abspath $(SLURM))/slurm.conf $(BIN)/python -m pytest -n 0 -m slurm tests/tools/test_slurm.py; \
		status=$$?; bash scripts/slurm/local.sh stop $(SLURM); exit $$status

package: $(BIN)/.runtime  ## archives of all bundles with the weights of make demo-all, in dist/
	$(BIN)/python scripts/package_bundle.py all --weights $(DEMO)

dist: $(BIN)/.dev  ## the wheel and the source archive, with their SHA-256, in dist/
	rm -f dist/dissect_monai-* dist/SHA256SUMS
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python scripts/package_bundle.py digests

release: $(BIN)/.runtime  ## check that all is ready to be published, and print the commands; sends nothing
	$(BIN)/python scripts/package_bundle.py release --weights $(DEMO)

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/render_results.py --check
	$(BIN)/python scripts/knobs.py all --check

docs: $(BIN)/.dev  ## the documentation site, in docs/_build; warnings are errors, and no network is needed
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build

type: $(BIN)/.dev
	$(BIN)/mypy

bench: $(BIN)/.bench  ## measure speed and memory against other libraries (DEVICE=cuda for a GPU)
	for script in quantizer augment contrast step segmentation; do $(BIN)/python benchmarks/$$script.py --device $(or $(DEVICE),cpu) || exit 1; done
	$(BIN)/python benchmarks/surface_metrics.py

PACK ?= runs/gpu_pack
OUT ?= runs/gpu
BUDGET ?= full
gpu:  ## all that needs a GPU, with this machine's python3 and without a network; PARTS=... chooses (docs/offline.md)
	$(PYTHON) scripts/gpu/run.py --pack $(PACK) --out $(OUT) --device $(or $(DEVICE),cuda) --budget $(BUDGET) $(if $(PARTS),--parts $(PARTS))

results: $(BIN)/.runtime  ## make tables and figures from results/, and the pages of the knobs
	$(BIN)/python scripts/render_results.py
	$(BIN)/python scripts/knobs.py all

FIGURES = runs/figures
figures: demo  ## the pictures of the README, from generated images alone: some 20 minutes; needs Chromium for the report
	$(BIN)/python scripts/make_figures.py images $(FIGURES)
	$(RUN) $(BUNDLE)/configs/train.json --dataset_dir $(FIGURES)/xrays --output_dir $(FIGURES)/pretrain_vq_ssl --encoder resnet18 --image_size 128 --batch_size 16 --hidden_dim 512 --decay 0.95 --max_epochs 8 --warmup_epochs 1 --val_interval 8 --num_workers 0
	$(RUN) bundles/seg_finetune_btcv/configs/train.json --output_dir $(FIGURES)/seg_finetune_btcv
	$(RUN) bundles/seg_finetune_btcv/configs/evaluate.json --output_dir $(FIGURES)/seg_finetune_btcv
	$(RUN) bundles/seg_finetune_btcv/configs/inference.json --output_dir $(FIGURES)/seg_finetune_btcv --dataset_dir $(FIGURES)/volumes/abdomen_ct
	$(BIN)/python scripts/make_figures.py overview $(FIGURES)
	$(BIN)/python scripts/make_figures.py demo $(BUNDLE)
	$(BIN)/python scripts/make_figures.py report $(FIGURES)/seg_finetune_btcv/eval/report.html docs/report.png

clean:
	rm -rf $(VENV) $(LABEL) .mypy_cache .pytest_cache .ruff_cache
