"""Core AI: the decoder as a traced module in an `.aimodel`."""

from gemma_export.targets.spec import MIB, Costs, TargetSpec

TARGET = TargetSpec(
    name="coreai",
    label="Core AI",
    made_by="gemma_export.targets.coreai.target:CoreaiTarget",
    extra="coreai",
    packages={"coreai": "coreai-core", "coreai_torch": "coreai-torch"},
    formats="every format",
    # Measured with coreai-torch 0.4.3 at 0.3 and 0.5 billion weights.
    costs=Costs(
        runtime=20 * MIB,
        exporting=1200 * MIB,
        weight_exported=4.8,
        float_bytes=2,
        has_ropes=False,
        alignment=64,
    ),
    scales_table=True,
    takes_irregular=True,
    caches=("float16",),
    only_caches="its program is traced with float16 caches",
    is_beta=True,
)
