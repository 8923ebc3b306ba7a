"""What the server of `new_process.py` imports before it forks the first process."""

from __future__ import annotations

import gc

gc.disable()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (as the first optimizer does)

gc.collect()
gc.freeze()  # a forked process that collects garbage would write into, and so copy, all pages of these modules
gc.enable()
