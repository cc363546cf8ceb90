"""Whether the bundles compute what their codes say."""

from collections.abc import Iterator

from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.verify import Verification
from gemma_runtime.proof.worst import WorstPosition
from gemma_runtime.report.chart import Form, Panel, Row, Value, draw
from gemma_runtime.report.collected import Collected, Column
from gemma_runtime.report.legend import bundles_legend
from gemma_runtime.report.parts import Part, Section, Table, TableRow, Warning, missing
from gemma_runtime.report.scale import decades
from gemma_runtime.report.wording import nats, number, percent
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer

_GOLDENS = 24  # most rows of the chart
_LEAD = (
    "Goldens are prompts with the logits of a float32 reference. Lowering compares the bundle with "
    "a reference of the same codes and decides the verdict. Quantization compares it with the "
    "float32 weights and is only reported. Token by token against whole prompts is the noise "
    "floor: the same bundle twice, in other chunks."
)
_HEAD = ("", "tokens", "top-1", "near ties", "max |Δ|", "mean |Δ|", "mean KL", "p99 KL")


def parity(collected: Collected) -> Section:
    found = collected.verified()
    known = [(c, found[c.digest].verification) for c in collected.columns if c.digest in found]
    if not known:
        return missing("parity", "Parity", "gemma-runtime verify BUNDLE --json > verify.json")
    parts: list[Part] = [
        Warning(f"{column.label}: {failure}") for column, v in known for failure in v.failures
    ]
    parts += [_figures(column, verification) for column, verification in known]
    parts += _by_golden(known)
    parts += [_worst(column, v.worst) for column, v in known if v.worst]
    return Section("parity", "Parity", _LEAD, tuple(parts))


def _figures(column: Column, verification: Verification) -> Table:
    limits = verification.limits
    return Table(
        _HEAD,
        tuple(
            TableRow(label, _cells(figures), quiet) for label, figures, quiet in _rows(verification)
        ),
        f"{column.label}: {verification.verdict.value}",
        f"Limits: mean KL {number(limits.max_mean_kl, '.0e')}, float kernels "
        f"{number(limits.max_exact_kl, '.0e')}, top-1 outside near ties at least "
        f"{percent(limits.min_top1, '.0f')}.",
    )


def _rows(verification: Verification) -> Iterator[tuple[str, Agreement, bool]]:
    yield "lowering", verification.lowering, False
    yield "whole prompts", verification.scored, True
    yield "token by token", verification.decoded, True
    yield "one against the other (noise)", verification.paths, True
    if verification.exact is not None:
        yield "float kernels", verification.exact, True
    if verification.engines is not None:
        yield "Core ML against ours", verification.engines, True
    yield "quantization", verification.quantization, False


def _cells(figures: Agreement) -> tuple[str, ...]:
    return (
        str(figures.positions),
        percent(figures.top1),
        str(figures.near_ties),
        number(figures.max_abs, ".3g"),
        number(figures.mean_abs, ".3g"),
        number(figures.mean_kl, ".1e"),
        number(figures.p99_kl, ".1e"),
    )


def _by_golden(known: list[tuple[Column, Verification]]) -> list[Part]:
    worst = {
        name: max(v.by_golden[name].mean_kl for _, v in known if name in v.by_golden)
        for _, verification in known
        for name in verification.by_golden
    }
    if not worst:
        return []
    names = sorted(worst, key=lambda name: (worst[name] != worst[name], worst[name]), reverse=True)
    rows = [Row(name, (_values(name, known),)) for name in names[:_GOLDENS]]
    values = [x.value for row in rows for x in row.cells[0]]
    panel = Panel("mean KL of the lowering, nats", Form.DOTS, decades(values), _power)
    legend = bundles_legend([column for column, _ in known])
    return [*legend, draw("Mean KL of each golden, worst first", [panel], rows)]


def _values(name: str, known: list[tuple[Column, Verification]]) -> tuple[Value, ...]:
    return tuple(
        Value(
            figures.mean_kl,
            f"{name}, {column.label}: mean KL {nats(figures.mean_kl)}, p99 {nats(figures.p99_kl)}, "
            f"{figures.positions} tokens",
            column.style,
            stripe=stripe,
            shape=column.shape,
        )
        for stripe, (column, verification) in enumerate(known)
        for figures in [verification.by_golden.get(name)]
        if figures is not None
    )


def _power(value: float) -> str:
    return number(value, "g")


def _worst(column: Column, positions: tuple[WorstPosition, ...]) -> Table:
    tokenizer = _tokenizer(column)
    rows = tuple(
        TableRow(
            f"{one.golden}, {one.position}",
            (
                "token by token" if one.decoded else "whole prompt",
                nats(one.kl),
                _token(tokenizer, one.token),
                _token(tokenizer, one.expected),
                _token(tokenizer, one.actual),
            ),
        )
        for one in positions
    )
    head = ("golden, position", "path", "KL", "after", "reference says", "bundle says")
    return Table(head, rows, f"{column.label}: the worst positions of the lowering")


def _tokenizer(column: Column) -> Tokenizer | None:
    if "tokenizer" not in column.bundle.manifest.roles:
        return None
    return load_tokenizer(column.bundle)


def _token(tokenizer: Tokenizer | None, token: int) -> str:
    if tokenizer is None or not 0 <= token < tokenizer.vocabulary_size:
        return f"#{token}"
    text = tokenizer.token_text(token)
    shown = text if isinstance(text, str) and text else tokenizer.piece(token)
    return f"“{shown}”".replace("\n", "⏎")
