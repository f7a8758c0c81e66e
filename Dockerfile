# An image of `unpadded serve`, for CPUs or for NVIDIA GPUs:
#
#   docker build -t unpadded:cpu .
#   docker build -t unpadded:cuda --build-arg DEVICE=cuda .
#
#   docker run -p 8080:8080 -v models:/models unpadded:cpu nomic-ai/nomic-embed-text-v1.5
#   docker run -p 8080:8080 --gpus all -v ./model:/model:ro unpadded:cuda /model --alias text-embedding-3-small
#
# A model given by its Hugging Face id is downloaded to /models at the first start.

ARG DEVICE=cpu

# gcc compiles the kernels for CPUs, and Triton's launchers.
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM base AS cpu
RUN pip install torch --index-url https://download.pytorch.org/whl/cpu

# torch from PyPI includes CUDA; the driver is the host's.
FROM base AS cuda
RUN pip install torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE} AS serve
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
RUN pip install ".[server]"
RUN useradd --uid 1000 --create-home unpadded && install --directory --owner=unpadded /models
ENV HF_HOME=/models/huggingface TRITON_CACHE_DIR=/models/triton XDG_CACHE_HOME=/models/cache
USER 1000
VOLUME /models
EXPOSE 8080
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["unpadded", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
