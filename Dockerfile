# CUDA base with the tested set of packages; runs as an ordinary user.
#   docker build -t mae .
#   docker run --gpus all --shm-size 16g -v $PWD/datasets:/mae/datasets -v $PWD/runs:/mae/runs mae experiment=digits_tiny
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc git \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 mae && mkdir /mae && chown mae:mae /mae
USER mae
WORKDIR /mae

# Dependencies first: a change of code does not install them again.
COPY --chown=mae:mae pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=mae:mae mae/__init__.py mae/__init__.py
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable '.[remote]'

COPY --chown=mae:mae . .
RUN mkdir -p datasets runs

ENV PATH=/mae/.venv/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "train.py"]
