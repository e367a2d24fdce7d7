# The server of an exported bundle: ONNX Runtime and HTTP, no torch. From the root of the repository:
#   docker build -f scripts/serve.Dockerfile --build-context bundle=logs/export/RUN/export -t digits .
#   docker run --rm -p 127.0.0.1:8000:8000 digits
# It may be asked by localhost and by any address; by a name if it is told: ... digits --hosts digits.example.org
# Knobs of conf/task/serve.yaml go behind the name of the image: docker run ... digits --workers 2 --max-batch 64
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/srv ORT_DISABLE_TELEMETRY=1
WORKDIR /srv

COPY constraints.txt .
RUN pip install --no-cache-dir --no-compile -c constraints.txt \
    onnxruntime numpy pillow uvicorn uvloop httptools orjson python-multipart prometheus-client
COPY src/espalier espalier
COPY --from=bundle . bundle

RUN useradd --system --no-create-home server
USER server

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["python", "-P", "-m", "espalier.serving", "/srv/bundle", "--host", "0.0.0.0"]
