"""The hash of what a safetensors file holds: its description and every tensor, whatever order the bytes lie in.

    sha256( text, then for every tensor by name: a line [name, dtype, shape, bytes] as JSON, and its bytes )

``text`` is the description with zeros where the hash itself stands. A hash finds accidents: a bit that fell over, a
tensor that another program rewrote. Whoever means harm can compute it anew, so that nothing may be trusted because
the hash is right; what a file asks for is checked on its own (``saqcli.io.described``).
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from saqcli.strict import json_text

BLANK = "0" * 64  # stands where the hash goes, while it is computed
DTYPES = {  # what a quantized model may be made of, by the names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The hash, in hexadecimal.

    Args:
        text: the description, ``BLANK`` in the place of the hash.
        tensors: by name, on the CPU, of ``DTYPES``.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        line = [name, DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size()]
        digest.update(f"\n{json_text(line)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
