#!/bin/sh
# Prints the CPU wheel index of torch if this is a Linux machine without an NVIDIA driver and the index answers within three
# seconds; prints nothing otherwise, and pip then takes torch from where it takes everything.
index=$1
[ "$(uname -s)" = Linux ] || exit 0
command -v nvidia-smi >/dev/null 2>&1 && exit 0
python3 - "$index" <<'PY' 2>/dev/null
import sys
from urllib.request import urlopen

try:
    with urlopen(sys.argv[1] + "/torch/", timeout=3):
        print(sys.argv[1])
except OSError:
    pass
PY
