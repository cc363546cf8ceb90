"""Plans the bundles of a request, whether its model generates text or gives vectors."""

from gemma_export.embedding.plan import EmbeddingPlan, plan_encoder
from gemma_export.embedding.request import choose_encoder_recipe, encoder_context, encoder_files
from gemma_export.plan import Plan
from gemma_export.request import ExportRequest, find_planned, kept_recipe, plan_found


def plan_model(request: ExportRequest) -> list[Plan] | list[EmbeddingPlan]:
    """Sizes and memory of each bundle, computed without reading weights."""
    checkpoint, config = find_planned(request)
    if not config.is_encoder:
        return plan_found(request, checkpoint, config)
    choice = choose_encoder_recipe(request)
    recipe, files = choice.recipe, None
    if checkpoint is not None:
        recipe, files = kept_recipe(recipe, checkpoint), encoder_files(checkpoint)
    context = encoder_context(request, config, files)
    return [plan_encoder(config, recipe, context, name, choice.reason) for name in request.targets]
