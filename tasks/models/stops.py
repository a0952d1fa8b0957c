"""The ids that end a completion: those a model's folder names, its template's end of a turn, and the recipe's."""

from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from configs.errors import BadInput
from tasks.tokens.token_bytes import Encoder, token_bytes


def configured_stops(folder: str) -> list[int]:
    """End tokens of `generation_config.json`, or where it names none, of `config.json`."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        found = None
    if found is None:
        try:  # as it is written: some families' classes have a default, which is another model's
            written, _ = PreTrainedConfig.get_config_dict(folder)
        except OSError:
            written = {}
        found = written.get("eos_token_id")
        found = (written.get("text_config") or {}).get("eos_token_id") if found is None else found
    return _listed(found)


def chosen_stops(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], name: str) -> list[int]:
    """The ids of a recipe's `stop`: tokens, or strings that are one token. BadInput says why another is none."""
    if not texts:
        return []
    added = {token.content: i for i, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    encoder, found = Encoder(tokenizer, token_bytes(tokenizer, name=name)), []
    for text in texts:
        ids = [added[text]] if text in added else encoder.encode([text])[0]
        if ids is None or len(ids) != 1:
            parts = "cannot be spelled" if ids is None else f"is {len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)})"
            raise BadInput(f"{name}: stop: {text!r} {parts} in its tokenizer; give a token, or a string that is one token")
        found += ids
    return found


def name_stops(model: PreTrainedModel, stop_ids: list[int]) -> None:
    """Let the generation config that a model is saved with name all stops."""
    config = model.generation_config
    if config is not None and set(_listed(config.eos_token_id)) != set(stop_ids):
        config.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]


def _listed(ids: int | list[int] | None) -> list[int]:
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
