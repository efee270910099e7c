"""The model's answers to the held-out samples: recorded, and measured by the recipe's metrics."""

from collections.abc import Callable

import torch.distributed as dist

from ..config.sections import ANSWERS_AT_ONCE
from ..data.prepared import Sample
from ..evaluation.during_training import AnswerMeasures, measure_answers
from ..models.generation import Generated, completion_texts, exact_match, generate_completions
from ..objectives.objective import Setup
from ..records.recorder import RunRecorder
from .trainer import StreamTrainer


class HeldOutAnswers:
    """Greedy answers to the held-out samples, which all ranks generate together, once a step.

    Args:
        setup: the run on this worker.
        trainer: computes in the types of the training.
        recorder: of rank 0; None on the other ranks.
        on_generate: called with the step before answers are generated.
    """

    def __init__(
        self,
        setup: Setup,
        trainer: StreamTrainer,
        recorder: RunRecorder | None,
        on_generate: Callable[[int], None],
    ) -> None:
        self._setup = setup
        self._trainer = trainer
        self._recorder = recorder
        self._on_generate = on_generate
        self._completions: tuple[int, list[Generated]] | None = None

    def record(self, step: int, when: str) -> dict[str, float]:
        """Record the answers; returns `exact_match`, or nothing without samples.

        Args:
            step: the number of steps done.
            when: before or after the training.
        """
        samples = self._samples()
        if not samples:
            return {}
        answers = completion_texts(self._setup.tokenizer, self._complete(step, samples))
        if self._recorder is not None:
            texts = [
                {"row": sample.row, "prompt": sample.prompt, "reference": sample.reference}
                for sample in samples
            ]
            self._recorder.add_answers(texts, answers, when)
        return {"exact_match": exact_match(answers, [sample.reference for sample in samples])}

    def measure(self, step: int) -> dict[str, float]:
        """The recipe's metrics of the answers, the same on every rank; nothing without any.

        Args:
            step: the number of steps done.
        """
        setup, metrics = self._setup, self._setup.recipe.eval.metrics
        samples = self._samples() if metrics else []
        if not samples:
            return {}
        completions = self._complete(step, samples)
        measured = [AnswerMeasures()]
        if self._recorder is not None:  # a function of the user need not be the same everywhere
            texts = completion_texts(setup.tokenizer, completions)
            measured = [measure_answers(metrics, samples, texts, completions, setup.device)]
            for problem in measured[0].problems:
                self._recorder.add_notice(f"step {step}: {problem}")
        if setup.world_size > 1:
            dist.broadcast_object_list(measured, src=0, group=self._trainer.cpu_group)
        return dict(measured[0].values)

    def _samples(self) -> list[Sample]:
        return self._setup.prepared.samples(self._setup.recipe.eval.samples)

    def _complete(self, step: int, samples: list[Sample]) -> list[Generated]:
        """The completions of the samples at this step."""
        setup = self._setup
        if self._completions is None or self._completions[0] != step:
            self._on_generate(step)
            with self._trainer.in_compute_type():
                completions = generate_completions(
                    setup.model,
                    setup.tokenizer,
                    [sample.prompt_ids for sample in samples],
                    setup.recipe.eval.max_new_tokens,
                    setup.rank,
                    setup.world_size,
                    at_once=max(1, ANSWERS_AT_ONCE // setup.evaluation_parts),
                )
            self._completions = (step, completions)
        return self._completions[1]
