"""Renders a plan for the console."""

from rich.console import Group, RenderableType
from rich.table import Table

from gemma_export.embedding.plan import EmbeddingPlan
from gemma_export.plan import CalibrationTime, PhoneVerdict, Plan
from gemma_export.targets import target_spec
from gemma_runtime.machine import format_bytes


def render_plan(plan: Plan | EmbeddingPlan) -> RenderableType:
    """A table of sizes, caches and memory, followed by a table of phones."""
    if isinstance(plan, EmbeddingPlan):
        return _render_embedding(plan)
    title = f"{plan.family} to {plan.target}, {plan.context_length} tokens of context"
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    table.add_column(style="bold")
    for label, value in _lines(plan):
        table.add_row(label, value)
    return Group(table, "", _phones(plan.phones))


def _render_embedding(plan: EmbeddingPlan) -> RenderableType:
    title = (
        f"{plan.family} to {plan.target}: vectors of {plan.dimensions} numbers, "
        f"{plan.context_length} tokens of context"
    )
    table = Table(show_header=False, box=None, title=title, title_justify="left")
    table.add_column(style="bold")
    for label, value in _embedding_lines(plan):
        table.add_row(label, value)
    return Group(table, "", _phones(plan.phones))


def _phones(verdicts: tuple[PhoneVerdict, ...]) -> Table:
    phones = Table(box=None, title="can an app run it?", title_justify="left")
    for heading in ("phone", "app may use", "needs", ""):
        phones.add_column(heading, justify="left" if heading in ("phone", "") else "right")
    for phone in verdicts:
        amounts = (format_bytes(phone.budget), format_bytes(phone.needed))
        phones.add_row(f"{phone.ram_gb} GB", *amounts, phone.verdict)
    return phones


def _embedding_lines(plan: EmbeddingPlan) -> list[tuple[str, str]]:
    parameters, file, run = plan.parameters, plan.artifact, plan.run
    chosen = "" if plan.reason is None else f", because {plan.reason}"
    return [
        ("recipe", f"{plan.recipe}{chosen}"),
        (
            "parameters",
            f"{parameters.total / 1e6:,.0f} M: table {parameters.table / 1e6:,.0f}, attention "
            f"{parameters.attention / 1e6:,.0f}, mlp and others {parameters.mlp / 1e6:,.0f}",
        ),
        (
            "weights",
            f"{format_bytes(file.total)}: table {format_bytes(file.table)} (stays on storage), "
            f"attention {format_bytes(file.attention)}, mlp and others {format_bytes(file.mlp)}",
        ),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        (
            "running",
            f"{format_bytes(run.total)} at most: weights {format_bytes(run.prepacked)} packed and "
            f"{format_bytes(run.mapped)} mapped, activations {format_bytes(run.activations)} for "
            f"{plan.context_length} tokens",
        ),
        ("exporting", f"{format_bytes(plan.export_peak_bytes)} at most"),
    ]


def _lines(plan: Plan) -> list[tuple[str, str]]:
    parameters, file, caches, run = plan.parameters, plan.artifact, plan.caches, plan.run
    chosen = "" if plan.reason is None else f", because {plan.reason}"
    uncounted = ", besides calibration: estimating it needs torch"
    if plan.counts_calibration:
        uncounted = ""
    return [
        ("recipe", f"{plan.recipe}{chosen}"),
        (
            "parameters",
            f"{parameters.total / 1e6:,.0f} M: table {parameters.table / 1e6:,.0f}, "
            + (f"head {parameters.head / 1e6:,.0f}, " if parameters.head else "")
            + (f"per layer {parameters.per_layer / 1e6:,.0f}, " if parameters.per_layer else "")
            + f"attention {parameters.attention / 1e6:,.0f}, mlp {parameters.mlp / 1e6:,.0f}, "
            f"norms {parameters.norms / 1e6:.1f}",
        ),
        (
            "weights",
            f"{format_bytes(file.total)}: table {format_bytes(file.table)}, "
            + (f"head {format_bytes(file.head)}, " if file.head else "")
            + (
                f"per-layer table {format_bytes(file.per_layer)}{_stays(plan)}, "
                if file.per_layer
                else ""
            )
            + f"attention {format_bytes(file.attention)}, mlp {format_bytes(file.mlp)}, "
            f"norms {format_bytes(file.norms)}, ropes {format_bytes(file.ropes)}",
        ),
        (
            "bits per weight",
            f"{plan.bits_per_weight:.2f}",
        ),
        (
            "caches",
            f"{format_bytes(caches.total)} of {caches.dtype}: local layers "
            f"{format_bytes(caches.local)}, global layers {format_bytes(caches.full)}; "
            f"{caches.note}",
        ),
        (
            "running",
            f"{format_bytes(run.total)} at most: weights {format_bytes(run.prepacked)} packed and "
            f"{format_bytes(run.mapped)} mapped, caches {format_bytes(run.caches)}, "
            f"activations {format_bytes(run.activations)}; loading {format_bytes(run.loading)}",
        ),
        (
            "exporting",
            f"{format_bytes(plan.export_peak_bytes)} at most{_on_device(plan)}{uncounted}",
        ),
        *(() if plan.calibration is None else (("calibrating", _calibrating(plan.calibration)),)),
    ]


def _on_device(plan: Plan) -> str:
    """What the export needs of an accelerator's own memory."""
    if plan.device_peak_bytes is None:
        return ""
    return f", and {format_bytes(plan.device_peak_bytes)} of {plan.device}"


def _calibrating(time: CalibrationTime) -> str:
    """Its time as this machine is now, by stage; or what it computes."""
    text = f"for {time.tokens:,} tokens of text"
    if time.seconds is None:
        products = sum(stage.multiply_adds for stage in time.stages)
        return (
            f"{products / 1e12:,.1f} · 10¹² multiply-adds {text}; this machine has no such device"
        )
    stages = [f"{x.name} {duration(x.seconds)}" for x in time.stages if x.seconds is not None]
    return f"about {duration(time.seconds)} {text} on this machine now: {', '.join(stages)}"


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _stays(plan: Plan) -> str:
    """Where the table of per-layer embeddings is while the model runs."""
    return " (stays on storage)" if target_spec(plan.target).costs.maps_per_layer else ""
