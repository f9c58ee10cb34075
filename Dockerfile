# mdm on a CPU; docs/start.md, In a container, builds and runs it.
FROM python:3.11-slim

# A C compiler builds the fused norms (nn/norms.c) when the first training starts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The default torch for Linux brings gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL
RUN : "${PIP_EXTRA_INDEX_URL:?add --build-arg PIP_EXTRA_INDEX_URL=ADDRESS, the CPU index that pytorch.org names}"

WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[openmoji,eval,plots,studio]'

# A user of any number (docker run --user) has no home folder and no name of its own.
ENV HOME=/tmp USER=mdm
WORKDIR /work
ENTRYPOINT ["mdm"]
