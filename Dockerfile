# The package with its page, on a CPU:                    docker build -t rlhf_jax .
# On NVIDIA GPUs (the wheels of JAX bring CUDA along):    docker build -t rlhf_jax --build-arg EXTRAS=cuda,serve .
#     docker run -v "$PWD/runs:/work/runs" rlhf_jax ppo_summarize --config=ppo_summarize:tiny --workdir=runs/demo
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=serve
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["rlhf-jax"]
