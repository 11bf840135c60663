# The tested set of packages, for any user.
#
#   docker build -t mae .
#   docker run --rm --gpus all --shm-size 16g --user $(id -u):$(id -g) \
#       -v $PWD/datasets:/mae/datasets -v $PWD/runs:/mae/runs mae experiment=digits_tiny
#
# Driver: 580 or newer. torch brings CUDA 13 with it; the base has the container runtime check the driver, and no more.
# Arguments (--build-arg NAME=VALUE):
#   BASE      a Debian or Ubuntu with Python 3.11 or newer
#   EXTRAS    optional dependencies of pyproject.toml: remote,sam,mlflow,… (docs/clusters.md)
#   PIP_ARGS  words for pip install, such as --index-url of a mirror
#   COMMIT    $(git rev-parse HEAD), which runs then record
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# torch.compile calls g++; tini is process 1, which passes signals on and collects orphans.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: a change of code does not install them again.
WORKDIR /mae
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mae/__init__.py mae/__init__.py
ARG EXTRAS=remote
ARG PIP_ARGS=
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${PIP_ARGS} --constraint constraints.txt --editable ".[${EXTRAS}]"

# Any user reads the code, and writes where it is the home and the working folder, as in /tmp.
COPY . .
RUN chmod -R a+rX . && python3 -m compileall -q . \
    && mkdir -p /home/mae datasets runs sweeps && chmod 1777 /home/mae . datasets runs sweeps
# Libraries look for the name of a user, and find none in /etc/passwd.
ARG COMMIT=
ENV PATH=/opt/venv/bin:$PATH HOME=/home/mae USER=mae PYTHONUNBUFFERED=1 MAE_COMMIT=$COMMIT
USER 10001:10001
ENTRYPOINT ["tini", "--", "python", "train.py"]
