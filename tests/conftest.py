"""One thread a process: the networks here are tiny, and a second thread waits more than it works on a shared machine."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
