#!/bin/sh
# Equal bytes on checkpoints with real layer shapes and random weights: writes them, runs realshape_long, removes them.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for shape in e2b 31b; do
    free=$(df -Pk "$dir" | awk 'NR == 2 { print $4 }')
    if [ "$free" -lt 16000000 ]; then
        echo "16 GB are needed in $dir, $free KB are free"
        exit 77
    fi
    "$root/build/release/tests/make_shape" $shape "$dir/$shape"
    "$root/build/release/tests/realshape_long" "$dir/$shape"
    rm -rf "${dir:?}/$shape"
done
