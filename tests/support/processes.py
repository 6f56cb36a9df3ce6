"""What tests with several processes need."""

from __future__ import annotations

import pytest
from torch import distributed, multiprocessing

FORKSERVER = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="processes are forked from a server here"
)
GLOO = pytest.mark.skipif(not distributed.is_gloo_available(), reason="two processes talk through gloo here")
