"""Turn a Gemma checkpoint into bundles that a phone, a laptop or a board can run.

    request = ExportRequest(("onnx",), find_recipe("int4"), checkpoint="./my-fine-tune")
    plans = plan_exports(request)
    (result,) = export_bundles(request)

Importing the package is cheap: each name is imported on first use. Exporting needs torch, which the
extras install; planning does not.
"""

from typing import TYPE_CHECKING

from gemma_runtime.errors import MissingExtra
from gemma_runtime.lazy import lazy_names
from gemma_runtime.privacy import opt_out

if TYPE_CHECKING:
    from gemma_export.pipeline import ExportResult, export_bundles, export_model
    from gemma_export.plan import Plan
    from gemma_export.quantize.recipe import Recipe, find_recipe, load_recipe
    from gemma_export.request import ExportRequest, plan_exports

    __version__: str

opt_out()  # before any library that collects usage statistics is imported

__all__ = [
    "ExportRequest",
    "ExportResult",
    "Plan",
    "Recipe",
    "__version__",
    "export_bundles",
    "export_model",
    "find_recipe",
    "load_recipe",
    "plan_exports",
]

_HOMES = {
    "gemma_export.pipeline": ("ExportResult", "export_bundles", "export_model"),
    "gemma_export.plan": ("Plan",),
    "gemma_export.quantize.recipe": ("Recipe", "find_recipe", "load_recipe"),
    "gemma_export.request": ("ExportRequest", "plan_exports"),
}

if not TYPE_CHECKING:  # else every misspelt name would pass the type checker
    _find = lazy_names(__name__, _HOMES)

    def __getattr__(name: str) -> object:
        """Import a public name. Raises MissingExtra if its module needs a missing package."""
        try:
            return _find(name)
        except ModuleNotFoundError as error:
            package = (error.name or "torch").partition(".")[0]
            raise MissingExtra(package, "export") from error

    def __dir__() -> list[str]:
        return sorted(__all__)
