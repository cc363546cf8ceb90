"""ONNX Runtime: the decoder as fused operators."""

from gemma_export.targets.spec import MIB, Costs, TargetSpec

TARGET = TargetSpec(
    name="onnx",
    label="ONNX Runtime",
    made_by="gemma_export.targets.onnx.target:OnnxTarget",
    extra="onnx",
    packages={"onnx": "onnx"},
    formats="int4 and int8 in groups of 16, 32, … 256, and float32",
    # Measured with onnxruntime 1.32 in Python on Linux x86, with shapes of 270m to 27b.
    costs=Costs(runtime=80 * MIB, packed=1.17, packing=1.2, exporting=240 * MIB),
    caches=("float32", "int8"),
    rounds_inputs=True,
    scales_table=True,
    divides_table=True,
    takes_irregular=True,
    takes_encoders=True,
)
