"""One thread a process: the networks are tiny, and a second thread waits more than it works."""

import gc
import os
import signal

import timm  # noqa: F401
import torch

import kdtoolkit

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)
kdtoolkit.distill  # noqa: B018  imports what every run needs
# every run ends with a garbage collection; it need not walk through the imported libraries
gc.collect()
gc.freeze()
