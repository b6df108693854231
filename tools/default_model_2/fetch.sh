#!/bin/sh
# Fetches the emoji packages by name and version from npm into $IMPASTO_DM (default: ./dm).
set -eu
work=${IMPASTO_DM:-dm}
mkdir -p "$work"
cd "$work"
npm install --no-audit --no-fund --ignore-scripts \
    @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 \
    @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/emojione@1.2.3 \
    @iconify-json/fxemoji@1.2.2 @iconify-json/noto-v1@1.2.5 emojibase-data@17.0.0
