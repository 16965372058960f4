# genemodel at the versions of constraints.txt, for a CPU or for NVIDIA GPUs; nothing runs as root.
#
#   docker build --tag genemodel .
#   docker build --tag genemodel:cuda --build-arg DEVICE=cuda .
#   docker build --tag genemodel:bench --build-arg EXTRAS=bench .
#
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" genemodel \
#       impute input=lung.h5ad output=lung.imputed.h5ad
#   docker run --rm --gpus all --shm-size 8g ... genemodel:cuda pretrain ...
#
# DEVICE=cuda takes PyTorch's own CUDA libraries: the host needs a driver and the NVIDIA container
# toolkit. Processes of one run share memory, for which Docker's 64 MB are too few: --shm-size.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
ARG EXTRAS=
# annoy, of the extra "bench", is compiled.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/genemodel
ENV PATH=/opt/genemodel/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY constraints.txt ./
# First, because it is the largest by far and changes least. From PyPI it comes with CUDA.
RUN case "$DEVICE" in \
        cpu) pip install --constraint constraints.txt torch \
            --index-url https://download.pytorch.org/whl/cpu \
            --extra-index-url https://pypi.org/simple ;; \
        cuda) pip install --constraint constraints.txt torch ;; \
        *) echo "DEVICE is cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY genemodel genemodel
RUN pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
# torch.compile has its kernels compiled when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 genemodel
COPY --from=build /opt/genemodel /opt/genemodel
# Whoever it runs as (--user) may have no home to keep compiled code in.
ENV PATH=/opt/genemodel/bin:$PATH \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
USER genemodel
WORKDIR /data
ENTRYPOINT ["genemodel"]
CMD ["--help"]
