"""The data card of a cache: what is in it, how it was made, what it can and cannot do, and what is known of licences."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from configs.models import STUDENT
from configs.schema import Recipe
from tasks.views.card import TEMPLATES, Source, list_sources
from tasks.views.markdown import format_table

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def name_source(recipe: Recipe) -> str:
    """What a recipe's teacher is called, without a folder of this machine."""
    teacher = recipe.student if recipe.self_taught else recipe.teacher
    assert teacher is not None
    return Source(teacher).hub_id or Path(teacher.model or teacher.recipe or STUDENT).stem


def render_cache_card(recipe: Recipe, told: dict[str, Any]) -> str:
    """The card as Markdown, with metadata for the Hub."""
    teacher = recipe.student if recipe.self_taught else recipe.teacher
    assert teacher is not None
    known = Source(teacher).card
    licence = known and (known.license_name or known.license)
    configs = [
        {"config_name": "texts", "data_files": "texts/*.parquet", "default": True},
        {"config_name": "prompts", "data_files": "prompts.parquet"},
        {"config_name": "vocab", "data_files": "vocab.parquet"},
    ]
    described = DatasetCardData(
        license=(known and known.license) or "unknown",
        license_name=known and known.license_name,
        license_link=known and known.license_link,
        task_categories=["text-generation"],
        size_categories=next((name for most, name in SIZES if told["texts"] < most), "n>10M"),
        tags=["potstill", "distillation", "logprobs"],
        configs=configs,
    )
    body = TEMPLATES.get_template("cache.md").render(
        told=told,
        teacher=Source(teacher).about if teacher.model != STUDENT else told["teacher"]["name"],
        licence=str(licence or ""),
        prompts=list_sources(recipe.prompts),
        figures=format_table(
            [
                {"figure": "texts", "value": f"{told['texts']:,} of {told['prompts']:,} prompts"},
                {"figure": "tokens of the teacher", "value": f"{told['tokens']:,}"},
                {"figure": "next bytes stored per token", "value": f"{told['events'] / told['tokens']:.1f}"},
                {"figure": "bytes per token on disk", "value": f"{told['bytes_per_token']:.1f}"},
                {"figure": "largest error of rounding, nats", "value": f"{told['rounding']['largest']:.1g}"},
                {"figure": "mean error of rounding, nats", "value": f"{told['rounding']['mean']:.1g}"},
                {"figure": "mean mass outside the stored bytes", "value": f"{told['outside']['mean']:.2g}"},
            ]
        ),
    )
    return f"---\n{described.to_yaml()}\n---\n\n{body}\n"
