"""What a person asks to be recorded beside what always is."""

from dataclasses import dataclass
from typing import Any

from blocks.errors import UserError


@dataclass(frozen=True)
class Recording:
    """register: the name in MLflow's registry under which the model becomes a version; alias: what that version is called.

    system_metrics: how busy the driver's machine is, too. report: what the model gets wrong, in pictures. UserError for an
    alias without a name.
    """

    register: str = ""
    alias: str = ""
    system_metrics: bool = False
    report: bool = False

    def __post_init__(self) -> None:
        if self.alias and not self.register:
            raise UserError(f"alias={self.alias} is for a version of a registered model: say register=NAME as well")

    def check(self) -> None:
        """UserError when MLflow takes no such name or alias: before the training, not after it."""
        if not self.register:
            return
        from mlflow.exceptions import MlflowException
        from mlflow.utils.validation import (  # private, but the one list there is
            _validate_model_alias_name,
            _validate_model_alias_name_reserved,
            _validate_model_name,
        )

        try:
            _validate_model_name(self.register)
            if self.alias:
                _validate_model_alias_name(self.alias)
                _validate_model_alias_name_reserved(self.alias)
        except MlflowException as error:
            raise UserError(f"register={self.register} alias={self.alias}: {error}") from error

    @classmethod
    def taken_from(cls, words: dict[str, Any]) -> "Recording":
        """From the runner's words, which are then without its own."""
        return cls(**{name: words.pop(name) for name in cls.__dataclass_fields__ if name in words})


ONLY_WHAT_ALWAYS_IS = Recording()
