"""Hugging Face: the codes as compressed-tensors or GPTQ, for transformers and vLLM."""

from gemma_export.targets.spec import MIB, Costs, Option, TargetSpec

TARGET = TargetSpec(
    name="hf",
    label="transformers or vLLM",
    made_by="gemma_export.targets.hf.target:HfTarget",
    extra="hf",
    packages={},
    formats="symmetric int4 and int8 in groups or per channel (the table becomes float16), and "
    "float32",
    on_device=False,
    takes_irregular=True,
    next_step="run {bundle} with transformers or vLLM",
    costs=Costs(
        runtime=400 * MIB,  # torch and transformers
        packed=3.2,  # transformers dequantizes int4 with its scales, 5 bits, to 16 bits
        exporting=160 * MIB,
        half_table=True,
        maps_per_layer=False,
        has_ropes=False,
        alignment=1,
    ),
    caches=("float16",),
    only_caches="transformers and vLLM choose the type when they load the folder",
    options=(
        Option(
            name="hf_format",
            help="How a Hugging Face folder stores quantized matrices: compressed-tensors, as "
            "llm-compressor writes them, or gptq, as AutoGPTQ and GPTQModel do.",
            choices=("compressed-tensors", "gptq"),
            default="compressed-tensors",
        ),
    ),
)
