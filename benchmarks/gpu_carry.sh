#!/bin/sh
# Gathers in build/gpu what gpu.py takes on a machine that has torch (a CUDA build, with its usual
# companions: numpy, pyarrow, accelerate) and no network: about 25 MiB, without Ray, which a run with
# --local does not need. Copy the checkout with build/gpu there, and run
#     sh build/gpu/go.sh --results FOLDER
set -e
cd "$(dirname "$0")/.."
to=build/gpu
rm -rf $to && mkdir -p $to/wheels $to/site
python=${PYTHON:-python3}
fetch() { # folder, requirements
    folder=$1 && shift
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${VERSION:-3.12}" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$folder" "$@"
}
pinned() { grep -ix "$1==.*" constraints.txt; }
for name in transformers peft trl datasets dill multiprocess pydantic pydantic_core annotated-types \
    typing_extensions typing-inspection shtab; do
    fetch $to/wheels "$(pinned $name)"
done
# bitsandbytes without the libraries of other CUDA versions, which are most of it
fetch $to "$(pinned bitsandbytes)"
(cd $to/site && unzip -q ../bitsandbytes-*.whl)
find $to/site -name '*.so' ! -name "*_cuda${CUDA:-130}.so" ! -name '*_cpu.so' -delete
rm $to/bitsandbytes-*.whl
cp benchmarks/gpu_older_torch.py $to/site/sitecustomize.py
cat >$to/go.sh <<'G'
set -e
site=$(mktemp -d)
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" build/gpu/wheels/*.whl
cp -r build/gpu/site/* "$site/"
ln -s "$PWD" "$site/finray"
# The record of a run names these versions.
for one in finray:0.1.0 ray:0; do
    name=${one%%:*}
    mkdir "$site/$name-${one##*:}.dist-info"
    printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "${one##*:}" >"$site/$name-${one##*:}.dist-info/METADATA"
done
export PYTHONPATH="$site" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec python3 benchmarks/gpu.py "$@"
G
du -sm $to
