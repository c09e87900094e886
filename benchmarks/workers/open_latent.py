"""Open a latent store and one latent in a process of its own; prints the seconds of both.

    python open_latent.py STORE LATENT [evict]

With `evict`, the store's files are dropped from the page cache before, so that they come from the disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from saetools.latents import LatentStore

path, latent, *evict = sys.argv[1:]
if evict:
    for file in Path(path).iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
start, cpu = time.perf_counter(), time.process_time()
store = LatentStore(path)
middle = time.perf_counter()
record = store.open_latent(int(latent))
end, cpu = time.perf_counter(), time.process_time() - cpu
assert record.top
print(json.dumps({"store": middle - start, "latent": end - middle, "cpu": cpu}))
