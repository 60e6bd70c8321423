"""One thread in every test process, so that two processes do not fight over two cores."""

import torch

torch.set_num_threads(1)
