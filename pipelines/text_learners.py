"""Learners of texts: a language model, and a classifier that begins from its encoder.

The two together are ULMFiT (Howard and Ruder, arXiv:1801.06146):

    learn = language_model_learner(lm_dls)
    learn.fit_one_cycle(3, 1e-2)
    save_encoder(learn, "encoder.safetensors")
    learn = text_classifier_learner(dls, encoder="encoder.safetensors")
    learn.fit(gradual_unfreeze(...))

The file of an encoder holds its weights, its sizes and the tokens of its vocabulary as data; where another vocabulary reads it,
each token gets its own row of the embedding, and a new one the mean of all.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from blocks.dataloaders import DataLoaders
from blocks.errors import UserError
from blocks.storage import put
from blocks.tensors import TensorText
from blocks.text import text_tfm
from blocks.words import UNK
from pipelines.learners import n_outputs, usual_metrics
from training import (
    Callback,
    Learner,
    ModelResetter,
    Perplexity,
    RNNRegularizer,
    awd_lstm_clas_split,
    awd_lstm_classifier,
    awd_lstm_lm,
    awd_lstm_lm_split,
    generate,
    token_accuracy,
    transformer_clas_split,
    transformer_classifier,
    transformer_lm,
    transformer_lm_split,
)
from training.checks import listed
from training.huggingface import (
    huggingface_classifier,
    huggingface_config,
    huggingface_split,
    load_huggingface_weights,
)
from training.learner import Splitter
from training.models import BUILDERS, ModelSpec


@dataclass(frozen=True)
class Arch:
    """The builders of a language model and of a classifier, and how their parameters are grouped for freezing.

    sizes: the arguments that make the encoder what it is, and that go with it from the one to the other. of_lm: those of a
    classifier that begins from a language model. penalties: alpha and beta of `RNNRegularizer`.
    """

    lm: Callable[..., nn.Module]
    classifier: Callable[..., nn.Module]
    lm_split: Splitter
    classifier_split: Splitter
    sizes: tuple[str, ...]
    of_lm: Mapping[str, Any]
    penalties: tuple[float, float]


ARCHS = {
    "awd_lstm": Arch(
        awd_lstm_lm,
        awd_lstm_classifier,
        awd_lstm_lm_split,
        awd_lstm_clas_split,
        sizes=("emb_sz", "n_hid", "n_layers"),
        of_lm={},
        penalties=(2.0, 1.0),
    ),
    "transformer": Arch(
        transformer_lm,
        transformer_classifier,
        transformer_lm_split,
        transformer_clas_split,
        sizes=("emb_sz", "n_hid", "n_layers", "n_heads"),
        of_lm={"causal": True},
        penalties=(0.0, 0.0),
    ),
}


HUGGINGFACE = Arch(
    huggingface_classifier,
    huggingface_classifier,
    huggingface_split,
    huggingface_split,
    sizes=(),
    of_lm={},
    penalties=(0.0, 0.0),
)


class TextLearner(Learner):
    """A Learner of texts, which can save its encoder, and take one over."""

    def save_encoder(self, path: str | Path) -> Path:
        """Write the encoder to the file `path`; see `save_encoder`."""
        return save_encoder(self, path)

    def load_encoder(self, path: str | Path) -> "TextLearner":
        """Take over the encoder in the file `path`, and freeze it; see `load_encoder`."""
        load_encoder(self, path)
        return self


class LMLearner(TextLearner):
    """A Learner of a language model, whose prediction for a text is how it goes on."""

    def predict(self, item: str, n_words: int = 1, *, no_unk: bool = True, **drawing: Any) -> str:  # type: ignore[override]
        """The text `item` and `n_words` tokens more. no_unk: none of them unknown. drawing: settings of `training.generate`."""
        tfm = text_tfm(self.dls)
        if tfm.backwards:
            raise UserError("this model reads texts from their end, so what it could go on with would come before the text")
        self._to_device()
        ids = tfm.encodes(item).tolist()
        banned = [tfm.pad_id, *([tfm.vocab.index(UNK)] if no_unk and UNK in tfm.vocab else [])]
        return tfm.decodes(
            torch.tensor([*ids, *generate(self.model, ids, n_words, banned=banned, **drawing)]).as_subclass(TensorText)
        )


def language_model_learner(
    dls: DataLoaders,
    arch: str = "awd_lstm",
    *,
    config: Mapping[str, Any] | None = None,
    drop_mult: float = 1.0,
    weights: str | Path | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    metrics: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
    **learner: Any,
) -> LMLearner:
    """A Learner of a language model on the data of `TextBlock(is_lm=True)`, with accuracy and perplexity.

    arch: "awd_lstm" or "transformer". config: arguments of the model's builder, such as the sizes `{"emb_sz": 128,
    "n_hid": 256, "n_layers": 2}`. drop_mult: a factor for all dropouts. weights: the file of an encoder to go on from
    (`save_encoder`), whose sizes are then taken, all but the embedding being frozen. alpha, beta: penalties of activations
    (`RNNRegularizer`), by default 2 and 1 for an AWD-LSTM, else none. learner: arguments of `Learner`.
    """
    kind = _arch(arch)
    begun = None if weights is None else read_encoder(weights)
    arguments = _arguments(kind, kind.lm, dls, config, drop_mult, begun)
    settings: dict[str, Any] = {"splitter": kind.lm_split, "moms": (0.8, 0.7, 0.8)} | learner
    learn = LMLearner(
        dls,
        kind.lm(**arguments),
        metrics=[token_accuracy(), Perplexity()] if metrics is None else metrics,
        callbacks=[_penalties(kind, alpha, beta), ModelResetter(), *listed(callbacks)],
        **settings,
    )
    if begun is not None:
        _take(learn, begun)
    return learn


def text_classifier_learner(
    dls: DataLoaders,
    arch: str = "awd_lstm",
    *,
    encoder: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    drop_mult: float = 0.5,
    n_out: int | None = None,
    lin_ftrs: Sequence[int] = (50,),
    ps: Sequence[float] | None = None,
    seq_len: int | None = None,
    max_len: int = 72 * 20,
    y_range: tuple[float, float] | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    metrics: Any = None,
    callbacks: Callback | Sequence[Callback] = (),
    **learner: Any,
) -> TextLearner:
    """A Learner of a classifier of texts, one output a class, or of values where the target is one.

    encoder: the file of a language model's (`save_encoder`), whose sizes are then taken; it is frozen until a phase, such as
    `gradual_unfreeze`'s, or `unfreeze` frees it. arch: also the folder of a model of transformers, which is frozen in the same
    way; its texts are those of `TextBlock(tokenizer=folder/tokenizer.json)`. config, drop_mult, alpha, beta: as in
    `language_model_learner`. n_out: how many outputs, by default what the target needs. lin_ftrs, ps: features and dropouts of
    the head's layers. seq_len, max_len: a text is read in pieces of `seq_len` tokens (72, by a Transformer 512), of which the
    last `max_len` are pooled. y_range: squeezes the output into it. metrics: by default the usual one for the target.
    """
    if Path(arch).is_dir() and arch not in ARCHS:
        kind, config = HUGGINGFACE, {"config": huggingface_config(arch)} | dict(config or {})
    else:
        kind = _arch(arch)
    begun = None if encoder is None else read_encoder(encoder)
    head: dict[str, Any] = {
        "n_out": n_out or n_outputs(dls),
        "lin_ftrs": list(lin_ftrs),
        "ps": [0.1] * len(lin_ftrs) if ps is None else list(ps),
        "max_len": max_len,
        "y_range": None if y_range is None else list(y_range),
    }
    if seq_len is not None:
        head["seq_len"] = seq_len
    if begun is not None:
        head |= kind.of_lm
    arguments = _arguments(kind, kind.classifier, dls, head | dict(config or {}), drop_mult, begun)
    settings: dict[str, Any] = {"splitter": kind.classifier_split, "moms": (0.8, 0.7, 0.8)} | learner
    learn = TextLearner(
        dls,
        kind.classifier(**arguments),
        metrics=usual_metrics(dls) if metrics is None else metrics,
        callbacks=[_penalties(kind, alpha, beta), *listed(callbacks)],
        **settings,
    )
    if kind is HUGGINGFACE and begun is None:
        load_huggingface_weights(learn.model, arch)
        learn.freeze()
    if begun is not None:
        _take(learn, begun)
    return learn


def _arch(name: str) -> Arch:
    if name not in ARCHS:
        raise UserError(f"arch={name!r} is not known: one of {', '.join(ARCHS)}, or for a classifier a folder of transformers'")
    return ARCHS[name]


def _penalties(kind: Arch, alpha: float | None, beta: float | None) -> RNNRegularizer:
    usual = kind.penalties
    return RNNRegularizer(usual[0] if alpha is None else alpha, usual[1] if beta is None else beta)


def _arguments(
    kind: Arch,
    builder: Callable[..., nn.Module],
    dls: DataLoaders,
    config: Mapping[str, Any] | None,
    drop_mult: float,
    begun: "EncoderFile | None",
) -> dict[str, Any]:
    known = inspect.signature(builder).parameters
    unknown = sorted(set(config or {}) - set(known))
    if unknown:
        raise UserError(f"config has {unknown[0]!r}, which the model has not: it takes {', '.join(known)}")
    sizes = {} if begun is None else {name: begun.arguments[name] for name in kind.sizes if name in begun.arguments}
    tfm = text_tfm(dls)
    own = {"n_vocab": len(tfm.vocab), "pad_id": tfm.pad_id, "drop_mult": drop_mult}
    return own | sizes | dict(config or {})


# --- encoders in files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderFile:
    """What a file of an encoder holds: the arguments its model was built with, its tokens, its weights by name."""

    path: Path
    arguments: dict[str, Any]
    vocab: tuple[str, ...]
    weights: dict[str, Tensor]


def save_encoder(learn: Learner, path: str | Path) -> Path:
    """Write the encoder of a Learner of texts to the file `path`: safetensors, with sizes and vocabulary. Returns the path."""
    spec: Any = getattr(learn.model, "spec", None)
    encoder = getattr(learn.model, "encoder", None)
    if not isinstance(spec, ModelSpec) or not isinstance(encoder, nn.Module):
        raise UserError(f"{type(learn.model).__name__} has no encoder of ours to save: make it by language_model_learner")
    path = Path(path)
    weights = {name: w.detach().cpu().clone().contiguous() for name, w in encoder.state_dict().items()}
    about = {"builder": spec.builder, "arguments": spec.arguments, "vocab": list(text_tfm(learn.dls).vocab)}
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path.parent, path.name, safetensors.torch.save(weights, metadata={"fastray": json.dumps(about)}))
    return path


def read_encoder(path: str | Path) -> EncoderFile:
    """What `save_encoder` wrote to the file `path`. UserError when it is none."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fastray"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        vocab, arguments = tuple(map(str, about["vocab"])), dict(about["arguments"])
        if not weights or about["builder"] not in BUILDERS:
            raise ValueError("it has no encoder")
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is no file that save_encoder wrote ({type(error).__name__}: {error})") from error
    return EncoderFile(path, arguments, vocab, weights)


def load_encoder(learn: Learner, path: str | Path) -> None:
    """Take over the encoder that `save_encoder` wrote to `path`, token by token, and freeze all but the last group.

    A token that it does not know gets the mean of its embedding's rows. UserError when its sizes are others.
    """
    _take(learn, read_encoder(path))


def _take(learn: Learner, file: EncoderFile) -> None:
    own = text_tfm(learn.dls).vocab
    encoder: nn.Module = learn.model.encoder  # type: ignore[assignment]
    weights = dict(file.weights)
    if EMBEDDING in weights:
        weights[EMBEDDING] = matched_rows(weights[EMBEDDING], file.vocab, own)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as mismatch:
        raise UserError(f"the encoder in {str(file.path)!r} has other sizes than this model: {mismatch}") from mismatch
    learn.freeze()


EMBEDDING = "embedding.weight"


def matched_rows(rows: Tensor, vocab: Sequence[str], own: Sequence[str]) -> Tensor:
    """The rows (tokens of `vocab`, features) in the order of the tokens `own`; the mean of all for those it has not."""
    if len(rows) != len(vocab):
        raise UserError(f"the encoder has {len(rows)} rows for {len(vocab)} tokens")
    place = {token: i for i, token in enumerate(vocab)}
    found = torch.cat([rows, rows.mean(0, keepdim=True)])
    return found[torch.tensor([place.get(token, len(vocab)) for token in own])]
