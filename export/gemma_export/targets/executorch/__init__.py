"""ExecuTorch: the decoder as XNNPACK delegates in one `.pte`."""

from gemma_export.targets.spec import MIB, Costs, Option, TargetSpec

TARGET = TargetSpec(
    name="executorch",
    label="ExecuTorch",
    made_by="gemma_export.targets.executorch.target:ExecutorchTarget",
    extra="executorch",
    packages={"executorch": "executorch"},
    formats="int4 in symmetric groups of 32, 64, …, symmetric int8 per channel, and float32",
    # Measured with executorch 1.5.1 in the native runner on Linux x86.
    costs=Costs(
        runtime=20 * MIB,
        packed=0.95,
        packing=0.9,
        table_kept=True,
        exporting=390 * MIB,
        caches_exported=1,
    ),
    caches=("float32",),
    only_caches="its XNNPACK delegates attend to float32 keys and values",
    rounds_inputs=True,
    scales_table=True,
    takes_irregular=True,
    int8_groups=False,
    options=(
        Option(
            name="delegate",
            help="Backend of an ExecuTorch program: xnnpack, vulkan or coreml. vulkan and coreml "
            "programs have never been run.",
            choices=("xnnpack", "vulkan", "coreml"),
            default="xnnpack",
            unavailable={
                "qnn": "Qualcomm's AI Engine Direct SDK",
                "openvino": "Intel's openvino package and its NNCF",
                "neuropilot": "MediaTek's mtk_converter",
                "ethos-u": "Arm's TOSA serializer and Vela",
                "enn": "Samsung's Exynos AI LiteCore",
                "mlx": "a Mac",
            },
        ),
    ),
)
