"""A target as a third party would write it; elsewhere, it needs only one line in each table."""

from gemma_export.targets.spec import MIB, Costs, Option, TargetSpec
from gemma_runtime.backend_table import Backend, Limits

TARGET = TargetSpec(
    name="fake",
    label="a dictionary of matrices",
    made_by="tests.export.fake_target.target:FakeTarget",
    extra="fake",
    packages={"numpy": "numpy"},
    formats="every format",
    costs=Costs(runtime=3 * MIB, exporting=5 * MIB, has_ropes=False, alignment=1),
    caches=("float32",),
    options=(
        Option(
            name="fake_precision",
            help="Precision of the weights in the artifact: single or half.",
            choices=("single", "half"),
            default="single",
        ),
    ),
)

BACKEND = Backend(
    opener="tests.export.fake_target.backend:open_fake_session",
    profiler="tests.export.fake_target.backend:profile_fake",
    limits=Limits(max_mean_kl=2e-3),
)
