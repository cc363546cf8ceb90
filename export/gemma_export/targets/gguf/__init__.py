"""GGUF: the codes as ggml blocks, for llama.cpp and Ollama."""

from gemma_export.targets.spec import MIB, Costs, TargetSpec

TARGET = TargetSpec(
    name="gguf",
    label="llama.cpp",
    made_by="gemma_export.targets.gguf.target:GgufTarget",
    extra="gguf",
    packages={"gguf": "gguf"},
    formats="int4 and symmetric int8 in groups of 32, 64, … and float32",
    # llama.cpp maps the file and repacks some weights for its kernels.
    costs=Costs(runtime=40 * MIB, exporting=160 * MIB),
    rounds_inputs=True,
    caches=("float16",),
    only_caches="llama.cpp chooses the type when it loads the file, by --cache-type-k and -v",
    takes_irregular=True,
    fast_zero_points=False,  # it repacks Q4_0 and Q8_0 for its fastest kernels, but not Q4_1
)
