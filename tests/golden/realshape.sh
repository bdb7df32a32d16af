#!/bin/sh
# The same bytes on real layer shapes with random weights: writes checkpoints under TMPDIR (0.9, 3.4 and 6.2 GB, one at a time; the packed weights
# take as much memory) and runs realshape_long on each. Skips a shape that does not fit.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$root/build/release/tests
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
status=77
for entry in e2b:2 26b-a4b:9 31b:15; do
    shape=${entry%:*} need=${entry#*:}
    disk=$(df -Pk "$dir" | awk 'NR == 2 { print int($4 / 1048576) }')
    memory=$(awk '/MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
    if [ "$disk" -lt "$need" ] || [ "$memory" -lt "$need" ]; then
        echo "skipped $shape: $need GiB of disk and memory wanted, $disk and $memory there"
        continue
    fi
    "$bin/make_shape" "$shape" "$dir/$shape"
    "$bin/realshape_long" "$dir/$shape"
    "$bin/members_test" "$dir/$shape"
    if [ "$shape" = 26b-a4b ]; then "$bin/experts_test" "$dir/$shape"; fi
    status=0
    rm -rf "${dir:?}/$shape"
done
exit $status
