# Potstill on CPUs and NVIDIA GPUs; flows/README.md has the commands and the build arguments.
ARG BASE=python:3.11-slim
FROM ${BASE}

# A compiler: one package of reasoning-gym's, pycosat, comes as C.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*

# Packages first: a change of the code does not install them again. pip reads its index from these arguments.
WORKDIR /potstill
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_NO_CACHE_DIR=1
ARG EXTRAS=gguf,hub,lora,math,s3
RUN mkdir configs flows storage tasks && touch configs/__init__.py flows/__init__.py storage/__init__.py tasks/__init__.py \
    && make .venv/.installed EXTRAS="${EXTRAS}"
ARG VLLM
RUN if [ -n "${VLLM}" ]; then make vllm VLLM="${VLLM}"; fi

# Any user may run it, with a home that cannot be written: runs/ and the cache of models are open to all. What was installed is
# newer than what was copied, so that `make demo` installs nothing.
COPY . .
RUN mkdir --mode=1777 runs /cache && touch .venv/.installed && .venv/bin/python -m compileall -q configs flows storage tasks
ENV PATH=/potstill/.venv/bin:${PATH} HF_HOME=/cache
USER 1000
CMD ["make", "demo"]
