# docker build -t abliterate .                       CPU
# docker build -t abliterate:cuda --target cuda .    NVIDIA GPUs: docker run --gpus all ...
# docker run --rm -v "$PWD:/work" -v abliterate:/cache abliterate run Qwen/Qwen3-0.6B
FROM python:3.11-slim AS wheel
COPY . /src
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /dist /src

FROM python:3.11-slim AS base
ENV HF_HOME=/cache/huggingface ABLITERATE_CACHE=/cache/abliterate OMP_WAIT_POLICY=PASSIVE PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 1000 user && mkdir -p /work /cache && chown user /work /cache
COPY --from=wheel /dist /dist
WORKDIR /work

# PyTorch's wheels bring CUDA's libraries; the driver is the host's.
FROM base AS cuda
RUN pip install --no-cache-dir "$(echo /dist/*.whl)[quantised,gguf,export,report]"
USER 1000
ENTRYPOINT ["abliterate"]
CMD ["--help"]

FROM base AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "$(echo /dist/*.whl)[gguf,export,report]"
USER 1000
ENTRYPOINT ["abliterate"]
CMD ["--help"]
