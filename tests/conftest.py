"""One thread in every test process, so that two processes do not fight over two cores; Triton is interpreted."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton, as models of some families do
