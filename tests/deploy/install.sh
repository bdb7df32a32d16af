#!/bin/sh
# Installs into a folder of its own, then: the program finds the demo model there, and a C program builds against libshoal alone.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cmake --install "$root/build/release" --prefix "$dir/usr" >/dev/null
unset SHOAL_SHARE || true

model=$("$dir/usr/bin/shoal" doctor | sed -n 's/^ok *demo model *//p')
[ "$model" = "$dir/usr/share/shoal/minnow" ] || { echo "demo model: '$model', not $dir/usr/share/shoal/minnow"; exit 1; }
cmp "$root/share/demo-batch.jsonl" "$dir/usr/share/shoal/demo-batch.jsonl"
for f in share/shoal/proto/job.proto share/shoal/minnow/model.safetensors; do
    [ -s "$dir/usr/$f" ] || { echo "$f was not installed"; exit 1; }
done

pc=$(dirname "$(find "$dir/usr" -name shoal.pc)")
cat >"$dir/client.c" <<'END'
#include <proto/client.h>
#include <stdio.h>
int main(void) {
    sh_client *c = NULL;
    if (sh_client_open("ipc:///nonexistent/socket", NULL, 200, &c) != SH_OK) return 2;
    Shoal__JobRequest r = SHOAL__JOB_REQUEST__INIT;
    Shoal__Request all = SHOAL__REQUEST__INIT;
    Shoal__JobReply *reply = NULL;
    r.status = &all;
    sh_status st = sh_client_call(c, &r, &reply);
    printf("%s\n", sh_error_text());
    sh_client_close(&c);
    return st == SH_EPEER ? 0 : 1;
}
END
export PKG_CONFIG_PATH="$pc"
# the prefix in the file is that of the configuration; an installation elsewhere says so
flags="--define-variable=prefix=$dir/usr"
# shellcheck disable=SC2046 # words
cc -std=gnu2x -o "$dir/client" "$dir/client.c" $(pkg-config $flags --cflags --libs shoal)
"$dir/client"
if ldd "$dir/client" | grep -q libmpi; then echo "libshoal brings MPI along"; exit 1; fi
