# The page with the shipped checkpoint, on a CPU; every script can be run in its place.
#
#     docker build -t vqa --build-arg TORCH_INDEX=URL .
#     docker run --rm -p 127.0.0.1:7860:7860 vqa
#
# URL: the index of torch's builds for the CPU, which the selector on pytorch.org names. Without it, torch brings several
# GB of CUDA libraries on x86.
FROM python:3.11.9-slim-bookworm
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN useradd --create-home user && mkdir /app && chown user /app
WORKDIR /app
COPY requirements.txt .
# torch first and alone: requirements.txt keeps the build that is there
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.txt)" \
    && pip install -r requirements.txt
COPY --chown=user . .
USER user
EXPOSE 7860 8000
CMD ["python", "test_gui.py", "--checkpoint", "demo/checkpoint", "gui.host=0.0.0.0"]
