"""Writes the seeds that are binary: `python -m tests.fuzz.make_corpus`.

Small files of every kind, made by the writers of this project and of the formats' own packages.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.formats.safetensors import TensorInfo, lay_out
from tests.fuzz.reader import CORPUS

CONFIG: dict[str, Any] = {
    **{"model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32},
    **{"sliding_window": 16, "query_pre_attn_scalar": 32, "max_position_embeddings": 256},
}
ADAPTER: dict[str, Any] = {
    **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]},
    **{"base_model_name_or_path": "google/gemma", "rank_pattern": {"up_proj": 2}, "bias": "none"},
}
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_GROUP = {"targets": ["Linear"], "weights": _WEIGHTS}
QUANTIZED: Mapping[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quantization_config": {
            **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
            **{"ignore": ["lm_head"], "config_groups": {"group_0": _GROUP}},
        }
    },
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "mlx": {"quantization": {"bits": 4, "group_size": 32}},
}
# The parts of a packed matrix of 32 × 32.
_PARTS: Mapping[str, Mapping[str, TensorInfo]] = {
    "compressed-tensors": {
        "weight_packed": TensorInfo("I32", (32, 4)),
        "weight_scale": TensorInfo("F32", (32, 1)),
        "weight_shape": TensorInfo("I64", (2,)),
    },
    "gptq": {
        "qweight": TensorInfo("I32", (4, 32)),
        "qzeros": TensorInfo("I32", (1, 4)),
        "scales": TensorInfo("F16", (1, 32)),
        "g_idx": TensorInfo("I32", (32,)),
    },
    "fp8": {
        "weight": TensorInfo("F8_E4M3", (32, 32)),
        "weight_scale_inv": TensorInfo("F32", (1, 1)),
    },
    "bitsandbytes": {"weight": TensorInfo("I8", (32, 32)), "SCB": TensorInfo("F32", (32,))},
    "mlx": {
        "weight": TensorInfo("U32", (32, 4)),
        "scales": TensorInfo("F16", (32, 1)),
        "biases": TensorInfo("F16", (32, 1)),
    },
}
_SHAPE = struct.pack("<2q", 32, 32)


def safetensors(layout: Mapping[str, TensorInfo], **metadata: str) -> bytes:
    """A file of zeros, but for shapes."""
    placed, header = lay_out(layout, metadata)
    parts = [
        _SHAPE if name.endswith("weight_shape") else bytes(info.bytes)
        for name, info in placed.items()
    ]
    return b"".join((header, *parts))


def weights(quantized: str) -> bytes:
    """A tiny checkpoint's weights; the projections of the first layer are packed."""
    config = config_from_hf(CONFIG)
    layout: dict[str, TensorInfo] = {}
    for name, shape in config.tensor_shapes().items():
        stored = config.hf_name(name)
        if quantized and ".0.mlp." in name:
            module = stored.removesuffix(".weight")
            layout |= {f"{module}.{part}": info for part, info in _PARTS[quantized].items()}
        else:
            layout[stored] = TensorInfo("BF16", shape)
    fields = QUANTIZED.get(quantized, {})
    return safetensors(layout, config=json.dumps({**CONFIG, **fields}))


def write_folder(folder: Path, quantized: str) -> None:
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, **QUANTIZED.get(quantized, {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights(quantized))


def adapter_weights() -> bytes:
    module = "base_model.model.model.layers.0.mlp.up_proj"
    down, up = TensorInfo("F32", (2, 32)), TensorInfo("F32", (32, 2))
    return safetensors({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(adapter_weights())


def main() -> None:
    from gguf.constants import GGMLQuantizationType

    from tests.export.gguf_files import GEMMA3, write_tiny

    with tempfile.TemporaryDirectory() as name:
        small = {**GEMMA3, **CONFIG, "num_hidden_layers": 1}
        for kind in ("Q4_0", "Q8_0"):
            path = write_tiny(Path(name), small, GGMLQuantizationType[kind])
            _write("gguf", kind, path.read_bytes())
        _proofs(Path(name))
        _write("pte", "linear", _pte())
        _package(Path(name) / "m.mlpackage")


def _write(reader: str, name: str, content: bytes) -> None:
    (CORPUS / reader).mkdir(parents=True, exist_ok=True)
    (CORPUS / reader / name).write_bytes(content)


def sentencepiece() -> bytes:
    """ModelProto: pieces of (text, score, type), and the id of bos in the trainer's settings."""
    pieces = [("<unk>", 2), ("<bos>", 3), ("<eos>", 3), ("▁", 1), ("a", 1), ("▁a", 1), ("aa", 1)]
    pieces += [(f"<0x{byte:02X}>", 6) for byte in range(16)]
    model = b""
    for text, kind in pieces:
        encoded = text.encode()
        piece = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x18" + bytes([kind])
        model += b"\x0a" + bytes([len(piece)]) + piece
    return model + b"\x12\x03\xc8\x02\x01"


def embedding_table() -> bytes:
    return safetensors({"codes": TensorInfo("U8", (8, 16)), "scales": TensorInfo("F16", (8, 1))})


def _proofs(folder: Path) -> None:
    from gemma_runtime.proof.goldens import Golden, save_goldens, top_logits
    from gemma_runtime.proof.teacher import TeacherSegment, save_teacher
    from gemma_runtime.snapshot import Snapshot
    from gemma_runtime.snapshot_file import Maker, write_snapshot

    top = top_logits(np.arange(12, dtype=np.float32).reshape(2, 6), 3)
    save_goldens(folder / "g", [Golden("a", [2, 3], top, top)])
    tokens, ids = np.arange(4, dtype=np.int32), np.zeros((4, 2), np.int32)
    log_probs = ids.astype(np.float32)
    segment = TeacherSegment("1", tokens, ids, log_probs, log_probs[1:, 0])
    save_teacher(folder / "t", [segment, segment])
    snapshot = Snapshot((2, 3), 2, "decode", {"k": np.zeros((1, 1, 2, 2), np.float32)})
    opening = '{"text": null, "system": "s", "examples": [], "tools": []}'
    maker = Maker("0", "tiny", "int4", "onnx", {}, "system", "processor", [])
    write_snapshot(folder / "b", snapshot, maker, {"opening": opening})
    for reader, name in (("goldens", "g"), ("teacher", "t"), ("baked prefix", "b")):
        _write(reader, "small", (folder / name).read_bytes())


def _pte() -> bytes:
    """A linear layer for XNNPACK, which has named data, and a constant beside it."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 2)
            self.table = torch.nn.Parameter(torch.ones(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            summed: torch.Tensor = self.linear(x) + torch.cumsum(self.table, 0)[0, 0]
            return summed

    exported = torch.export.export(Small(), (torch.ones(1, 4),))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return bytes(lowered.to_executorch().buffer)


def _package(folder: Path) -> None:
    from tests.runtime.mil.test_damaged import build

    build(folder)
    target = Path(__file__).with_name("m.mlpackage")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)


if __name__ == "__main__":
    main()
