"""The facts that every method states, with the defaults of most, and what groups of them share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from .metric import Metric, declared
from .models import Head, LoraAdapter, ModelSettings
from .paths import resolve_path
from .places import about
from .reference_folder import find_reference
from .section import Section
from .sections import CheckpointSettings, DataSettings, OptimSettings

LearnsFrom = Literal["documents", "pairs", "graded pairs", "labelled answers", "prompts"]
"""The rows that a method learns from. A graded pair may say by how much its chosen answer leads: in
the method's `columns`."""

_REFERENCE = "method.reference_model"

PAIR_MEASURES = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
"""Share of the pairs whose chosen answer has the higher reward, by how much, and both rewards."""


class MethodSettings(Section):
    """The facts of a method, with defaults that fit most methods; its only setting is the kind."""

    title: ClassVar[str]
    """The method's full name, for reports."""
    learns_from: ClassVar[LearnsFrom]
    sequences_per_row: ClassVar[int] = 1
    """Token sequences of a row, each of at most `data.max_length` tokens."""
    packs: ClassVar[bool] = False
    """Rows are single documents, several of which may share a sequence."""
    has_answers: ClassVar[bool] = False
    """A held-out row is a prompt with a reference answer, which can be compared."""
    splits_overlong: ClassVar[bool] = False
    """A row that is too long becomes several sequences; otherwise `data.overlong` decides."""
    measures: ClassVar[tuple[str, ...]]
    """Metrics logged in addition to the loss; held-out data gives the same names after `eval_`."""
    watched: ClassVar[Metric] = declared("eval_loss")
    """The metric that decides which checkpoint is the best; a sweep's objective by default."""
    head: ClassVar[Head] = "causal"
    samples_online: ClassVar[bool] = False
    """The model answers the prompts itself while it is trained, and rewards score its answers."""
    learning_rate_share: ClassVar[float | None] = None
    """Good learning rate as a share of the one for imitation, which falls with the model's width.
    None: the rate of preference and online methods, which does not."""

    kind: str

    def step_metrics(self) -> tuple[str, ...]:
        """Loss and measures that a logged step reports."""
        return ("loss", *self.measures)

    def held_out_metrics(self, trains_adapter: bool) -> tuple[str, ...]:
        """Loss and measures that held-out data gives, without their prefix `eval_`.

        Args:
            trains_adapter: beside an adapter, the frozen base is a reference at no cost.
        """
        del trains_adapter
        return self.step_metrics()

    def metric(self, name: str) -> Metric:
        """A metric that a run of the method reports, with its direction."""
        return declared(name)

    @property
    def trains_on_all(self) -> bool:
        """True if the loss covers every token, False if only those of the assistant."""
        return False

    @property
    def trains_on_last(self) -> bool:
        """True if only the last assistant turn of a conversation is trained."""
        return False

    @property
    def trains_on_reasoning(self) -> bool:
        """True if the reasoning of an answer is trained with it."""
        return True

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that the recipe names for the loss, beside those of the format."""
        return ()

    @property
    def starts_at_random(self) -> bool:
        """True if training starts from random weights instead of the base's."""
        return False

    @property
    def reference_name(self) -> str | None:
        """The setting `reference_model`; None if it is absent or the method has no such setting."""
        return None

    @property
    def uses_reference(self) -> bool:
        """True if steps compute log-probabilities of a reference model."""
        return False

    def holds_second_model(self, trains_adapter: bool) -> bool:
        """True if a second model stays in memory during training.

        Beside an adapter the frozen base is the reference, unless the recipe names another one.
        """
        return self.uses_reference and (self.reference_name is not None or not trains_adapter)

    @property
    def completions_at_once(self) -> int:
        """Completions that a worker generates in one batch on the trained model's own weights."""
        return 0

    @property
    def samples_top_p(self) -> bool:
        """True if tokens are sampled from the likeliest that together have a probability."""
        return False

    @property
    def averages_by_pass(self) -> bool:
        """True if the loss depends on which rows share a forward pass."""
        return False

    @property
    def repeats(self) -> int:
        """Optimizer steps on the same rows before the next rows are used."""
        return 1

    def rows_per_step(self, batch_size: int) -> int:
        """Number of data rows in one optimizer step of `batch_size` sequences."""
        return batch_size

    def row_length(self, max_length: int) -> int:
        """Largest number of tokens of a text, if a sequence has at most `max_length`."""
        return max_length

    @property
    def run_facts(self) -> dict[str, Any]:
        """Entries of run.json that the method adds to its kind."""
        return {}

    def resolve(self, places: Sequence[Path]) -> Self:
        """The same settings with absolute paths.

        Args:
            places: folders that a relative path may start from; the recipe's is the first.

        Raises:
            InputError: a path does not lead to usable files.
        """
        return self

    @property
    def models(self) -> dict[str, str]:
        """The models that the method loads beside the base, by key in the recipe.

        Each is a folder, or a hub id that may have a revision (owner/name@revision).
        """
        return {}

    def with_models(self, names: Mapping[str, str]) -> Self:
        """The same settings with other names for the models of these keys."""
        return self

    @property
    def runs(self) -> dict[str, str]:
        """The finished runs whose results the method loads, by key in the recipe."""
        return {}

    @property
    def why_not_shardable(self) -> str | None:
        """Why this method cannot train a sharded model, and what to do instead; None if it can."""
        return None

    def contradiction(
        self, data: DataSettings, optim: OptimSettings, checkpoint: CheckpointSettings
    ) -> str | None:
        """Message about a conflict between the method's settings and other sections; else None."""
        return None

    def model_contradiction(self, model: ModelSettings, adapter: LoraAdapter | None) -> str | None:
        """Message about a conflict between the method's settings and the model; else None."""
        return None


class DocumentSettings(MethodSettings):
    """Facts of methods that imitate single documents."""

    learns_from: ClassVar[LearnsFrom] = "documents"
    packs: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("token_accuracy", "entropy")
    learning_rate_share: ClassVar[float | None] = 1.0


class PairSettings(MethodSettings):
    """Facts of methods that learn from pairs of answers."""

    learns_from: ClassVar[LearnsFrom] = "pairs"
    sequences_per_row: ClassVar[int] = 2
    has_answers: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES


class ReferenceSettings(MethodSettings):
    """Facts of methods with a reference model that the user can choose."""

    reference_model: str | None = None
    """Hub id (owner/name, or owner/name@revision), model folder or finished run of the reference;
    absent: the model as this run starts."""

    @property
    def reference_name(self) -> str | None:
        """The setting `reference_model`."""
        return self.reference_model

    @property
    def uses_reference(self) -> bool:
        """True: these methods compare with a reference."""
        return True

    def resolve(self, places: Sequence[Path]) -> Self:
        """The settings with `reference_model` as the folder of its weights; a hub id stays."""
        if self.reference_model is None:
            return self
        with about("method.reference_model"):
            folders = [resolve_path(self.reference_model, place) for place in places]
        reference = find_reference(self.reference_model, folders)
        return self.model_copy(update={"reference_model": reference})

    @property
    def models(self) -> dict[str, str]:
        """The reference, if the recipe names one."""
        return {} if self.reference_model is None else {_REFERENCE: self.reference_model}

    def with_models(self, names: Mapping[str, str]) -> Self:
        """The same settings with another name of the reference."""
        update = {"reference_model": names.get(_REFERENCE, self.reference_model)}
        return self.model_copy(update=update)
