#!/bin/sh
# One S3 server on one machine, for trying things out. Its single user has the key and secret of the environment.
# Usage: s3.sh [FOLDER [ADDRESS [S3-PORT MASTER-PORT VOLUME-PORT FILER-PORT]]]
# Places are arguments because weed takes environment variables named like its options for these options.
set -eu
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}"
folder="${1:-/data}"
umask 077
cat > "${folder}/s3.json" <<JSON
{"identities": [{"name": "owner", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "${AWS_ACCESS_KEY_ID}", "secretKey": "${AWS_SECRET_ACCESS_KEY}"}]}]}
JSON
exec weed server -dir="${folder}" -ip=127.0.0.1 -ip.bind="${2:-0.0.0.0}" -master.volumeSizeLimitMB=1024 -volume.max=0 \
    -master.port="${4:-9333}" -volume.port="${5:-8080}" -filer -filer.port="${6:-8888}" \
    -s3 -s3.port="${3:-8333}" -s3.config="${folder}/s3.json" -s3.port.iceberg=0 -s3.port.lance=0
