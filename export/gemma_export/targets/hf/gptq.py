"""GPTQ: matrices as AutoGPTQ and GPTQModel write them, transposed. N rows, K inputs, G groups.

`qweight` (K · bits / 32, N) int32: words along the inputs, the earlier code in the lower bits.
`scales` (G, N) float16. `qzeros` (G, N · bits / 32) int32: zero points minus one, packed along the
outputs. `g_idx` (K,) int32: the group of each input. Sources: AutoGPTQ `qlinear_cuda_old.py`,
GPTQModel `quantization/config.py`, optimum `gptq/quantizer.py`, vLLM `utils/gptq_utils.py`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import Format
from gemma_export.model.config import GATE_UP, HEAD, QKV
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.hf.weights import LOOKED_UP, Packing, Part
from gemma_runtime.errors import TargetError
from gemma_runtime.formats.safetensors import TensorInfo

_MULTIPLE = 32  # of rows and inputs: the kernels' words must be full
_TRANSPOSED = 1 << 23  # numbers transposed at a time: 32 MiB of words
_HEAD = HEAD.removesuffix(".weight")
_FUSED = ((QKV, "self_attn.qkv_proj"), (GATE_UP, "mlp.gate_up_proj"))  # layers of vLLM
_Own = dict[str, int]  # bits and group size of a module; {} if it is float


def _parts(weight: StoredWeight) -> dict[str, Part]:
    fmt, (rows, width) = weight.format, weight.shape
    if rows % _MULTIPLE or width % _MULTIPLE:
        raise TargetError(
            f"--hf-format gptq can't store {weight.name} of {rows} x {width}, expected multiples "
            f"of {_MULTIPLE}; use --hf-format compressed-tensors"
        )
    module, groups = weight.name.removesuffix(".weight"), width // fmt.group
    below_middle = (1 << (fmt.bits - 1)) - 1
    zeros = sum(below_middle << shift for shift in range(0, 32, fmt.bits))
    qzeros = torch.full((groups, rows * fmt.bits // 32), zeros, dtype=torch.int32)
    order = torch.arange(width, dtype=torch.int32) // fmt.group
    step = max(1, _TRANSPOSED // rows)
    return {
        f"{module}.qweight": Part(
            TensorInfo("I32", (width * fmt.bits // 32, rows)),
            partial(_transposed, weight, "codes", torch.int32),
            step,
        ),
        f"{module}.qzeros": Part(
            TensorInfo("I32", tuple(qzeros.shape)), lambda start, stop: qzeros[start:stop]
        ),
        f"{module}.scales": Part(
            TensorInfo("F16", (groups, rows)),
            partial(_transposed, weight, "scales", torch.float16),
            step,
        ),
        f"{module}.g_idx": Part(
            TensorInfo("I32", (width,)), lambda start, stop: order[start:stop]
        ),
    }  # fmt: skip


def _transposed(
    weight: StoredWeight, part: str, dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Rows [start, stop) of a transposed part: columns of the stored one."""
    rows, width = weight.shape
    transposed = torch.empty(stop - start, rows, dtype=dtype)
    for first, last in row_blocks((rows, width)):
        block = weight.part(part, first, last).view(dtype)
        transposed[:, first:last] = block[:, start:stop].t()
    return transposed


def _config(formats: Mapping[str, Format]) -> dict[str, Any] | None:
    """The `quantization_config`; None if every linear layer is float.

    The format of most layers is the model's. `dynamic` has the others: `+:` and what differs, or
    `-:` for a float layer. Only GPTQModel and vLLM read it. `modules_in_block_to_quantize` tells
    transformers (optimum) which layers are quantized, and an empty `block_name_to_quantize` that
    the head is one of them.
    """
    own = {n.removesuffix(".weight"): _own(fmt) for n, fmt in formats.items() if n not in LOOKED_UP}
    quantized = [name for name, fields in own.items() if fields]
    if not quantized:
        return None
    layers = [name for name in quantized if name != _HEAD] or quantized
    ((common, _),) = Counter(tuple(own[name].items()) for name in layers).most_common(1)
    fields: dict[str, Any] = {
        "quant_method": "gptq",
        **dict(common),
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": _HEAD in quantized,
    }
    if dynamic := dict(_dynamic(own, dict(common))):
        fields["dynamic"] = dynamic
    if _HEAD in quantized:
        fields["block_name_to_quantize"] = ""
    if len(quantized) < len(own):
        fields["modules_in_block_to_quantize"] = [quantized]
    return fields


def _own(fmt: Format) -> _Own:
    if fmt.is_float:
        return {}
    return {"bits": fmt.bits, "group_size": -1 if fmt.per_channel else fmt.group}


def _dynamic(own: Mapping[str, _Own], common: _Own) -> Iterator[tuple[str, _Own]]:
    """Patterns of the modules that differ, also under the names of vLLM's fused layers."""
    for name, fields in own.items():
        if fields != common:
            yield _rule(name, fields)
    for names, fused in _FUSED:
        for name in own:
            if not name.endswith(names[0]):
                continue
            layer = name.removesuffix(names[0])
            together = [own[layer + other] for other in names if layer + other in own]
            if together[0] != common and all(one == together[0] for one in together):
                yield _rule(layer + fused, together[0])


def _rule(name: str, fields: _Own) -> tuple[str, _Own]:
    return f"{'+' if fields else '-'}:{re.escape(name)}$", fields


GPTQ = Packing(_parts, _config, ("transformers", "optimum", "gptqmodel"))
