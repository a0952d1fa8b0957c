"""Data sets of the Hugging Face hub, or folders in their form."""

from typing import Any

from configs.errors import BadInput
from configs.prompts import HubPrompts
from storage.lineage import digest_json, digest_table

BATCH = 10_000  # rows that are held at once


def load_hub_dataset(config: HubPrompts) -> Any:
    """A `datasets.Dataset`. Raises BadInput where it cannot be loaded."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise BadInput("prompts.source: 'hub' needs the datasets package: pip install -e '.[hub]'") from None
    try:
        return load_dataset(config.dataset, config.subset, split=config.hub_split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise BadInput(
            f"prompts.dataset: {config.dataset} cannot be loaded: {reason}; give a data set of the hub that this machine "
            "reaches, or a folder of one, with prompts.subset and prompts.hub_split as it has them"
        ) from None


def digest_hub_dataset(config: HubPrompts) -> str:
    """The digest of its rows, read in batches: a name says nothing of what is behind it today."""
    batches = load_hub_dataset(config).with_format("arrow").iter(batch_size=BATCH)
    return digest_json([digest_table(batch) for batch in batches])
