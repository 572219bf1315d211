"""Models of the `transformers` library as the body of a classifier of texts, from a folder on this machine.

The folder is what `save_pretrained` writes: config.json, model.safetensors and tokenizer.json. Only architectures that the
library has itself are built: no code of the folder's is run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from blocks.errors import UserError
from training.models import model_builder
from training.text import Encoder, Hidden, PoolingHead, TextClassifier, mean_pool


class HuggingFaceEncoder(Encoder):
    """Tokens int64 (rows, steps) -> what the model's last layer gives (rows, steps, features), and no state.

    config: that of an architecture of transformers, as in config.json; the weights are random.
    """

    def __init__(self, config: dict[str, Any], pad_id: int):
        transformers = _transformers()
        try:
            known = transformers.AutoConfig.for_model(**config)
            body = transformers.AutoModel.from_config(known, trust_remote_code=False)
        except (KeyError, ValueError) as error:
            raise UserError(f"transformers cannot build the model_type {config.get('model_type')!r}: {error}") from error
        super().__init__(known.hidden_size, pad_id)
        if hasattr(body, "pooler"):
            body.pooler = None  # tokens are pooled by the classifier, and parameters without a use would never train
        self.body = body

    def forward(self, tokens: Tensor, hidden: Hidden = None) -> tuple[Tensor, Hidden]:
        return self.body(input_ids=tokens, attention_mask=self.attended(tokens).long()).last_hidden_state, None


@model_builder
def huggingface_classifier(
    *,
    config: dict[str, Any],
    n_vocab: int,
    n_out: int,
    pad_id: int,
    drop_mult: float = 1.0,
    output_p: float = 0.1,
    lin_ftrs: Sequence[int] = (),
    ps: Sequence[float] = (),
    seq_len: int = 512,
    max_len: int = 1440,
    y_range: Sequence[float] | None = None,
) -> nn.Module:
    """A `TextClassifier` of a model of transformers, and the mean of what it gives of each token.

    config: its config.json. UserError when the tokens, `n_vocab`, are more than it has.
    """
    if n_vocab > config.get("vocab_size", n_vocab):
        raise UserError(
            f"the texts have {n_vocab} tokens, the model {config['vocab_size']}: tokenise them by its own tokenizer.json, "
            "TextBlock(tokenizer=folder / 'tokenizer.json')"
        )
    encoder = HuggingFaceEncoder(config, pad_id)
    head = PoolingHead(encoder.n_features, n_out, lin_ftrs, [output_p * drop_mult, *ps], y_range)
    longest = min(seq_len, config.get("max_position_embeddings", seq_len))
    return TextClassifier(encoder, head, longest, max_len, mean_pool)


def huggingface_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder. UserError when there is none."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(folder)!r} is no folder of a model of transformers, with a config.json: {error}") from error


def load_huggingface_weights(model: nn.Module, folder: str | Path) -> None:
    """Have a `huggingface_classifier`'s body start from the weights in `folder`. UserError when they are not its own."""
    body: Any = model.encoder.body  # type: ignore[union-attr]
    file = Path(folder) / "model.safetensors"
    try:
        found = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"the weights {str(file)!r} cannot be read: {error}") from error
    # A model saved with a head of its own has its body's weights under the body's name.
    under = f"{body.base_model_prefix}."
    named = {name.removeprefix(under): weight for name, weight in found.items()}
    wanted = body.state_dict()
    missing = [name for name in wanted if name not in named or named[name].shape != wanted[name].shape]
    if missing:
        raise UserError(f"{str(file)!r} has not the weights of a {type(body).__name__}: {', '.join(missing[:3])} and others")
    body.load_state_dict({name: named[name] for name in wanted})


def huggingface_split(model: nn.Module) -> list[list[nn.Parameter]]:
    """Groups of a classifier for freezing: all before the layers, each layer (what follows them: the last), and the head."""
    body: nn.Module = model.encoder.body  # type: ignore[union-attr,assignment]
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m)]
    layers = [list(layer.parameters()) for layer in max(lists, key=len)] if lists else []
    of_layers = {id(p) for layer in layers for p in layer}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    seen = False
    for p in body.parameters():
        seen = seen or id(p) in of_layers
        if id(p) not in of_layers:
            (after if seen else before).append(p)
    if layers:
        layers[-1] += after
    return [group for group in [before, *layers, list(model.head.parameters())] if group]  # type: ignore[union-attr]


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise UserError("models of transformers are in the extra: pip install 'fastray[text]'") from None
    return transformers
