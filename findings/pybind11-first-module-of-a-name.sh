#!/bin/sh
# pybind11 3.1.0, two builds of one extension loaded into one process from their files, to compare them.
#
# Expected: importlib.util.spec_from_file_location("kernels", path) and module_from_spec give the module of that file,
# as with 2.13.6 and as with modules written in C or Python, sys.modules being none of their concern.
# Seen: the second call gives the first file's module again, for pybind11 keeps finished modules by their name. A
# comparison of the two builds compares the first with itself. Names that differ ("first.kernels") help.
#
# Exit 0 where that is still so, 1 where it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" pybind11==3.1.0
export PYTHONPATH="$folder/site"
for build in 1 2; do
    mkdir "$folder/$build"
    cat > "$folder/$build/kernels.cpp" <<CPP
#include <pybind11/pybind11.h>
PYBIND11_MODULE(kernels, m) { m.def("build", [] { return $build; }); }
CPP
    # shellcheck disable=SC2046
    c++ -std=c++17 -shared -fPIC $(python3 -m pybind11 --includes) "$folder/$build/kernels.cpp" \
        -o "$folder/$build/kernels.so"
done
python3 - "$folder" <<'PYTHON'
import importlib.util
import sys


def load(build):
    spec = importlib.util.spec_from_file_location("kernels", f"{sys.argv[1]}/{build}/kernels.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builds = [load(build).build() for build in (1, 2)]
print("builds loaded: [1, 2]")
print("builds got:   ", builds)
if builds != [1, 1]:
    sys.exit("this has changed")
PYTHON
