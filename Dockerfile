# For NVIDIA GPUs. The first stage compiles; the second has the programs that DeepSpeed compiles its extensions with in
# the run (nvcc, g++), and no sources.
#   docker build -t internseg_ds .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v "$PWD:/work" internseg_ds \
#     deepspeed --num_gpus 8 --module internseg_ds.cli.train CONFIG --deepspeed_config zero3_bf16
# --ipc host: processes of a host exchange data in /dev/shm, of which a container has 64 MiB otherwise.
# torch's CUDA (constraints.txt: 13.0 for torch 2.13) and nvcc's must have the same major version.
ARG CUDA=13.0.1
ARG UBUNTU=ubuntu24.04

FROM nvidia/cuda:${CUDA}-devel-${UBUNTU} AS build
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/internseg_ds
ENV PATH=/opt/internseg_ds/bin:$PATH \
    PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt torch torchvision setuptools wheel packaging ninja opencv-python-headless

# before the sources, for they change more often; the build needs but these
COPY internseg_ds/__init__.py internseg_ds/version.py internseg_ds/allocator.py internseg_ds/exit_codes.py internseg_ds/
COPY internseg_ds/cli/__init__.py internseg_ds/cli/build_mmcv.py internseg_ds/cli/
RUN PIP_CONSTRAINT=constraints.txt python -m internseg_ds.cli.build_mmcv --wheels /tmp/wheels && rm -r /tmp/wheels

COPY setup.py pyproject.toml README.md LICENSE ./
COPY internseg_ds internseg_ds
COPY configs configs
COPY ds_configs ds_configs
RUN pip install -c constraints.txt --no-build-isolation '.[transformers,lora,wandb]'


FROM nvidia/cuda:${CUDA}-devel-${UBUNTU}
ARG DEBIAN_FRONTEND=noninteractive
# ssh and pdsh: runs over several hosts, started by deepspeed; python3-dev: extensions are compiled for it
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git openssh-client pdsh python3 python3-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/internseg_ds /opt/internseg_ds
ENV PATH=/opt/internseg_ds/bin:$PATH
WORKDIR /work
CMD ["internseg-train", "--env"]
