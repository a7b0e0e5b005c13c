# Built from the wheel: `make dist`, then `docker build -t dissect-monai .`; runs the demo. For a GPU:
#     docker build -t dissect-monai --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE=python:3.12-slim
FROM ${BASE}
# Where pip looks for packages, too, such as builds of PyTorch for CPUs alone, which are much smaller.
ARG PIP_EXTRA_INDEX_URL
RUN python3 -c "import ensurepip" || (apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*)
RUN useradd --create-home --uid 1001 dissect && install --directory --owner dissect /out
WORKDIR /home/dissect
COPY constraints.txt dist/dissect_monai-*.whl /tmp/
RUN python3 -m venv /opt/venv && /opt/venv/bin/python -m pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/dissect_monai-*.whl
COPY bundles bundles
ENV PATH=/opt/venv/bin:$PATH
USER dissect
CMD ["python", "-m", "monai.bundle", "run", "--config_file", "bundles/pretrain_vq_ssl/configs/train.json", "--output_dir", "/out"]
