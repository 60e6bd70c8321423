"""What tests must mend in Triton's interpreter."""

import contextlib

import pytest
import torch


@contextlib.contextmanager
def right_bf16():
    """Inside it bf16 is what it is on a GPU: Triton 3.9 as it comes multiplies tiles' bits as integers, and cuts off
    what it should round."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, multiply = interpreter.interpreter_builder, interpreter.interpreter_builder.create_dot
    convert = interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(a, b, *rest):
        return multiply(widened(a), widened(b), *rest)

    def convert_float(data, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, from_dtype, to_dtype, rounding_mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(interpreter, "_convert_float", convert_float)
        yield
