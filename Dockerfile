# All commands of the project, without a key and without data; see docs/clusters.md.
#
#   docker build --tag diffusion-sweeps --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" .
#   docker build --tag diffusion-sweeps:cuda --build-arg DEVICE=cuda .     # the host gives the driver of its GPUs
ARG PYTHON=3.11.13-slim-bookworm
FROM python:${PYTHON}

# g++ is for torch.compile. tini, as process 1, passes signals on and reaps what agents leave behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt ./
# PyPI's PyTorch brings CUDA with it; that of the other index is 2 GB smaller and wins by its version, such as 2.9.0+cpu.
ARG DEVICE=cpu
RUN case "$DEVICE" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "DEVICE = $DEVICE: expected cpu or cuda" >&2; exit 2 ;; \
    esac \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY agent agent
COPY diffusion_core diffusion_core
COPY pruning pruning
COPY scripts scripts
COPY sweeps sweeps
RUN pip install --no-cache-dir --no-deps .

# There is no repository in the image, so the runs learn their commit from here.
ARG COMMIT=
ENV DIFFUSION_SWEEPS_COMMIT=$COMMIT PYTHONUNBUFFERED=1

# Runs and W&B's caches are below /work: mount a disk there to keep them.
RUN useradd --uid 1000 --create-home --home-dir /work sweeps
USER 1000
WORKDIR /work
ENTRYPOINT ["tini", "--", "python", "-m", "agent"]
