# syntax=docker/dockerfile:1
# The HTTP service on a CPU, without root, fit for a read-only file system (compose.yaml shows how).
#   docker build -t opensan .
#   docker run --rm -p 8000:8000 opensan --model tiny

FROM python:3.12-slim AS build
RUN python -m venv /opt/opensan
ENV PATH=/opt/opensan/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch alone first, from where it is built without CUDA: a change of opensan leaves this layer as it is.
# Another index: docker build --build-arg TORCH_INDEX=https://mirror.example/simple .
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.8"
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install "/source[serve]"

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home opensan
COPY --from=build /opt/opensan /opt/opensan
ENV PATH=/opt/opensan/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/models
RUN mkdir /models && chown opensan /models
USER opensan
VOLUME /models
EXPOSE 8000
# SIGTERM, which docker stop sends, finishes what was accepted.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["opensan", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "san-vit-b16"]
