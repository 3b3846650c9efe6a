# fastsimclr with its CUDA extension, on NVIDIA's PyTorch image:
#   docker build -t fastsimclr .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" fastsimclr python -m fastsimclr.train --data.train photos
# 25.11 has Python 3.12, PyTorch 2.10 and CUDA 13.0, which requires driver 580 or later.
ARG PYTORCH=25.11-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The image pins its packages in /etc/pip/constraint.txt ($PIP_CONSTRAINT). Two changes are needed: remove the pins of
# DALI and its libraries, because DALI 2 needs newer ones, and pin NVIDIA's torch, which PyPI's must not replace. The
# pins don't apply to the isolated build of the wheel, which needs a newer setuptools.
RUN --mount=type=bind,target=/src,rw \
    sed -i -E '/^(torch|torchvision|nvidia[-_](dali|nvimgcodec|libnvcomp|nvjpeg|nvtiff)[^=]*)==/d' /etc/pip/constraint.txt \
    && python -m pip list --format=freeze | grep -E '^(torch|torchvision)==' >> /etc/pip/constraint.txt \
    && PIP_CONSTRAINT=/dev/null FASTSIMCLR_CUDA=1 python -m pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheels /src \
    && python -m pip install --no-cache-dir /tmp/wheels/*.whl \
    && rm -r /tmp/wheels \
    && python -m fastsimclr.doctor
