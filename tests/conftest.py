"""One thread a process: the networks are tiny, and a second thread waits more than it works."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
