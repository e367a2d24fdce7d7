# Training in a container, on CPUs or with CUDA. From the root of the repository:
#   docker build -f scripts/train.Dockerfile -t espalier .
#   docker run --rm -v "$PWD/logs:/home/trainer/logs" espalier train model=cnn
#   docker run --rm --gpus all --ipc host -v "$PWD/logs:/home/trainer/logs" -v "$PWD/photos:/photos:ro" espalier train \
#     data=hub_images data.path=/photos
# Another build of torch: docker build --build-arg PIP_EXTRA_INDEX_URL=ADDRESS ..., with the address of PyTorch's install page.
# --gpus needs NVIDIA's container toolkit on the machine. logs/ has to be writable for user 1000, or say --user root.
FROM python:3.11-slim AS tools

# git for provenance, a compiler for learner.compile=true; both for the editor's container as well
RUN apt-get update && apt-get install -y --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 --shell /bin/bash trainer
ENV PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM tools AS train

ARG PIP_EXTRA_INDEX_URL
WORKDIR /project
# An empty package first: what is installed stays as it is while sources and choices change.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/bootstrap scripts/
RUN mkdir -p src/espalier conf && touch src/espalier/__init__.py && PIP_NO_CACHE_DIR=1 scripts/bootstrap
COPY conf conf
COPY src src

USER trainer
WORKDIR /home/trainer
RUN mkdir logs
ENTRYPOINT ["/project/.venv/bin/espalier"]
CMD ["train"]
