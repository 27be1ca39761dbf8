# Serving image: pkd[serve] on a slim base, without torch. Bundles and keys are mounted, never baked in:
#   docker build -t pkd .
#   docker run --rm -p 8000:8000 -v "$PWD/bundles:/bundles:ro" -v "$PWD/secrets:/secrets:ro" \
#     pkd /bundles/teacher /bundles/student --api-keys /secrets/api-keys.txt
# Mount the folder of the keys, not the file: an editor that writes a new file and renames it would leave the container
# with the old one. Only aligned crops are taken without --detector /bundles/yunet.onnx, which is face_detection_yunet of
# the OpenCV Zoo. Galleries, or the audit log beside Milvus, go to a volume on /var/lib/pkd: docs/operations.md.

FROM python:3.12.15-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3 AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# Further extras: docker build --build-arg EXTRAS=serve,milvus,otel .
ARG EXTRAS=serve
RUN python -m venv /opt/pkd
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY pkd pkd
COPY toolkit toolkit
COPY export export
COPY serving serving
# The last line keeps the promise of a small image: fail the build rather than ship torch.
RUN /opt/pkd/bin/pip install ".[${EXTRAS}]" \
    && /opt/pkd/bin/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") and "torch was pulled in")'

FROM python:3.12.15-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3
# OpenCV's wheel links these system libraries. Their versions are the base image's to choose.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 libxcb1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin pkd
# A new volume that is mounted here takes its owner, so that the server can write.
RUN install -d -o 10001 -m 0700 /var/lib/pkd
COPY --from=build /opt/pkd /opt/pkd
ENV PATH=/opt/pkd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["pkd-serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
