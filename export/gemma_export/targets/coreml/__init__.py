"""Core ML: the decoder as MIL operations in an `.mlpackage`."""

from gemma_export.targets.spec import MIB, Costs, Option, TargetSpec

TARGET = TargetSpec(
    name="coreml",
    label="Core ML",
    made_by="gemma_export.targets.coreml.target:CoremlTarget",
    extra="coreml",
    packages={"coremltools": "coremltools"},
    formats="every format on a GPU; one symmetric scale per channel, and float16, on the Neural "
    "Engine",
    # Running is estimated. Exporting was measured with coremltools 9, which is imported after the
    # goldens are recorded.
    costs=Costs(
        runtime=20 * MIB,
        exporting=400 * MIB,
        float_bytes=2,
        has_ropes=False,
        alignment=64,
    ),
    scales_table=True,
    takes_irregular=True,
    caches=("float16",),
    only_caches="Core ML's states hold float16 only",
    options=(
        Option(
            name="coreml_compute",
            help="Hardware that a Core ML package is laid out for: gpu, or ane (the Neural Engine; "
            "never run on one).",
            choices=("gpu", "ane"),
            default="gpu",
        ),
        Option(
            name="coreml_embed",
            help="Where a Core ML bundle stores the embedding table: inside the model, or external "
            "in a file that the app maps. \\[inside for gpu, external for ane]",
            choices=("inside", "external"),
        ),
    ),
)
