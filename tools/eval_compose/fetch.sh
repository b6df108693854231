#!/bin/sh
# Fetches the packages that only the judges see into $IMPASTO_DM, beside tools/default_model/fetch.sh's.
set -eu
cd "${IMPASTO_DM:-dm}"
npm install --no-audit --no-fund --ignore-scripts \
    @iconify-json/fluent-emoji@1.2.7 @iconify-json/openmoji@1.2.29 @iconify-json/emojione-v1@1.2.3 \
    @iconify-json/streamline-emojis@1.2.4
