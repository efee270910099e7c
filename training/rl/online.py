"""The common part of GRPO and RLOO: completions are sampled and scored before a step."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel

from ..common.errors import FinrayError
from ..config.methods import OnlineMethod
from ..data import stream
from ..data.batching import IGNORED, PADDING_ROW, Batch, Rows
from ..data.documents import moved
from ..models.loading import evaluation_mode
from ..objectives.objective import Objective, Setup
from ..objectives.references import Reference
from .advantages import standard_deviation
from .policy import divergence
from .rewards.loading import load_rewards
from .rollouts.local import LocalRollouts
from .rollouts.rollout import Request, Rollout, Rollouts
from .scoring import Scorer, Scores, measure, sampled_measures

_HELD_OUT = 2**32
"""Takes the place of a step in seeds: every evaluation draws the same numbers."""
_EXAMPLE_PROMPTS, _EXAMPLE_COMPLETIONS = 2, 4


class OnlineObjective(Objective):
    """Samples rollouts and computes rewards and log-probabilities; its rows are prompts.

    A method adds advantages and its loss.
    """

    policy_measures: ClassVar[tuple[str, ...]] = ("kl", "clipped")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.settings = cast(OnlineMethod, setup.recipe.method)
        self.temperature = self.settings.temperature
        self.measures = (*sampled_measures(self.settings), *self.policy_measures)
        self._tokenizer = setup.tokenizer
        self.skips_step = False
        self._keeps_examples = setup.rank == 0
        self._examples: list[dict[str, Any]] = []
        # With an adapter it takes no memory, and the held-out divergence is a useful metric.
        has_reference = self.settings.beta > 0 or isinstance(setup.model, PeftModel)
        self._reference = Reference(setup, None) if has_reference else None
        rows = setup.recipe.rows_per_step
        earlier = (stream.share(rows, rank, setup.world_size) for rank in range(setup.rank))
        self._first_place = sum(earlier)
        self._tools: tuple[Rollouts, Scorer] | None = None

    # what each method defines

    needs_old: bool
    """True if the old policy's log-probabilities are computed before the step.

    Otherwise the loss uses the step's own, without a gradient.
    """

    def advantages(self, rewards: torch.Tensor, divergences: torch.Tensor | None) -> torch.Tensor:
        """The advantage of each completion, (prompts, generations) in float64.

        Args:
            rewards: (prompts, generations); NaN where no reward has a value.
            divergences: log policy - log reference of each completion, (completions,), in nats;
                None without a reference.
        """
        raise NotImplementedError

    def weigh(self, mask: torch.Tensor, tokens: int, sequences: int) -> tuple[torch.Tensor, int]:
        """Weight of each token's loss, and the number of loss units of a forward pass.

        Args:
            mask: (sequences, columns), 1.0 where a token is trained.
            tokens: number of tokens that are trained.
            sequences: number of sequences that are completions, not padding.
        """
        raise NotImplementedError

    # before a step

    def batches(self, step: int, rows: Rows) -> list[Batch]:
        """Sample and score completions, and compute their advantages."""
        generations = self.settings.generations
        requests = self.requests(step, rows)
        prompts = [row for row in rows for _ in range(generations)]
        rollouts, scores = self._rollouts(requests, prompts)
        self.skips_step = not self._any_reward(scores)
        sequences = self._sequences(prompts, rollouts)
        places = self.parts(sequences)
        parts = [self._part([sequences[place] for place in part]) for part in places]
        rewards = scores.total.to(self.device).view(-1, generations)
        deviations = standard_deviation(rewards)
        advantages = self.advantages(rewards, _divergences(parts, places)).flatten()
        sampled = measure(scores, deviations.cpu(), rollouts).to(self.device)
        self._keep_examples(requests, scores, advantages)
        return [
            self._with_advantages(part, _at(advantages, own), sampled * (index == 0))
            for index, (part, own) in enumerate(zip(parts, places, strict=True))
        ]

    def requests(self, step: int, prompts: Rows) -> list[Request]:
        """The completions to sample in a step, prompt by prompt.

        The seed depends on the prompt's place in the global batch, so the samples do not depend on
        the number of workers.
        """
        return [
            Request(row.input_ids.tolist(), (self.recipe.seed, step, self._first_place + place, n))
            for place, row in enumerate(prompts)
            for n in range(self.settings.generations)
        ]

    def _rollouts(self, requests: list[Request], rows: Rows) -> tuple[list[Rollout], Scores]:
        """Completions and their scores; an error on one worker is raised on all."""
        failure: FinrayError | None = None
        try:
            sampler, scorer = self._sampler_and_scorer()
            rollouts = sampler.sample(requests)
            scores = scorer.score(rows, rollouts)
        except FinrayError as error:
            failure = error
        _raise_together(failure, self.world_size)
        return rollouts, scores

    def _any_reward(self, scores: Scores) -> bool:
        """True if a completion of the global batch has a reward.

        Without any, the divergence, weight decay and momentum would still move the weights.
        """
        count = (~scores.total.isnan()).sum().to(self.device)
        if self.world_size > 1:
            dist.all_reduce(count)
        return bool(count)

    def _sampler_and_scorer(self) -> tuple[Rollouts, Scorer]:
        """Sampler and scorer, made at the first use, so that an error is raised on all workers."""
        if self._tools is None:
            rewards = load_rewards(self.recipe, self._tokenizer, self.device)
            rollouts: Rollouts
            if self.settings.rollout == "vllm":
                from .rollouts.vllm import VllmRollouts

                assert isinstance(self.model, PeftModel)
                rollouts = VllmRollouts(self.recipe, self.model, self._tokenizer)
            else:
                rollouts = LocalRollouts(self.model, self._tokenizer, self.settings)
            self._tools = rollouts, Scorer(rewards, self._tokenizer)
        return self._tools

    def _part(self, sequences: Rows) -> Batch:
        """The batch of a forward pass, with the old and the reference's log-probabilities."""
        batch = self._together(sequences or [PADDING_ROW])
        extra: dict[str, torch.Tensor] = {}
        with evaluation_mode(self.model):
            if self.needs_old:
                extra["old"] = self.log_probabilities(self.model, batch)
            if self._reference is not None and self.settings.beta > 0:
                extra["reference"] = self._reference(self.log_probabilities, batch)
        return replace(batch, extra=extra)

    def _together(self, sequences: Rows) -> Batch:
        pad: int = self._tokenizer.pad_token_id
        return self.assemble(sequences, pad).to(self.device)

    def _sequences(self, rows: Rows, rollouts: Sequence[Rollout]) -> Rows:
        return [self._sequence(*pair) for pair in zip(rows, rollouts, strict=True)]

    def _sequence(self, row: stream.Sequence, rollout: Rollout) -> stream.Sequence:
        prompt, size = len(row.input_ids), len(row.input_ids) + len(rollout.ids)
        is_trained = rollout.ended or not self.settings.mask_truncated
        return stream.Sequence(
            np.concatenate([row.input_ids, np.array(rollout.ids, np.int32)]),
            np.array([size], np.int32),
            (np.arange(size) >= prompt) & is_trained,
            row.rows,
        )

    def _with_advantages(
        self, part: Batch, advantages: torch.Tensor, sampled: torch.Tensor
    ) -> Batch:
        count = len(part.targets)
        mask = (part.targets != IGNORED).to(advantages.dtype)
        weights, units = self.weigh(mask, len(part.trained), len(advantages))
        padded = torch.cat([advantages, advantages.new_zeros(count - len(advantages))])
        extra = {"advantages": padded, "weights": weights, "sampled": sampled}
        return replace(part, loss_units=units, extra=part.extra | extra)

    # measures and examples

    def measured(
        self, batch: Batch, log_probabilities: torch.Tensor, outside: torch.Tensor
    ) -> torch.Tensor:
        """Sums and counts of the measures of a forward pass, (measures, 2) in float64.

        Args:
            batch: the batch, with its extra tensors.
            log_probabilities: the policy's, without a graph.
            outside: 1.0 where clipping removes the gradient, else 0.0; NaN for padding.
        """
        is_valid = ~outside.isnan()
        values = torch.where(is_valid, outside, 0.0).double()
        clipped = torch.stack([values.sum(), is_valid.sum().double()])
        parts = [self._kl(batch, log_probabilities, batch.extra.get("reference")), clipped]
        return torch.cat([batch.extra["sampled"], torch.stack(parts)])

    @staticmethod
    def _kl(batch: Batch, policy: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """Sum and count of the tokens' divergences, (2,); zeros without a reference."""
        if reference is None:
            return policy.new_zeros(2, dtype=torch.float64)
        mask = batch.targets != IGNORED
        total = (divergence(policy, reference) * mask).sum().double()
        return torch.stack([total, mask.sum().double()])

    def evaluate_held_out(self, microbatches: Iterator[Rows], device: torch.device) -> torch.Tensor:
        """Sample and score one completion per held-out prompt, always with the same seeds."""
        rows = [row for part in microbatches for row in part]
        requests = [
            Request(row.input_ids.tolist(), (self.recipe.seed, _HELD_OUT, int(row.rows[0])))
            for row in rows
        ]
        rollouts, scores = self._rollouts(requests, rows)
        sampled = measure(scores, torch.zeros(0), rollouts).to(device)
        kl = torch.zeros(2, dtype=torch.float64, device=device)
        sequences = self._sequences(rows, rollouts) if self._reference is not None else []
        for places in self.evaluated.parts(sequences):
            assert self._reference is not None
            batch = self._together([sequences[place] for place in places])
            policy = self.log_probabilities(self.model, batch)
            kl += self._kl(batch, policy, self._reference(self.log_probabilities, batch))
        no_values = torch.zeros(1, 2, dtype=torch.float64, device=device)
        return torch.cat([no_values, sampled, kl[None], no_values])

    def examples(self) -> list[dict[str, Any]]:
        """Some of the last step's completions with their rewards and advantages."""
        return self._examples

    def _keep_examples(
        self, requests: list[Request], scores: Scores, advantages: torch.Tensor
    ) -> None:
        generations = self.settings.generations
        names = [reward.name for reward in self.settings.rewards]
        self._examples = [
            {
                "prompt": self._tokenizer.decode(requests[index].prompt_ids),
                "completion": scores.texts[index],
                "reward": float(scores.total[index]),
                "rewards": dict(zip(names, scores.each[:, index].tolist(), strict=True)),
                "advantage": float(advantages[index]),
            }
            for index in range(min(len(requests), _EXAMPLE_PROMPTS * generations))
            if self._keeps_examples and index % generations < _EXAMPLE_COMPLETIONS
        ]


def _divergences(parts: list[Batch], places: list[list[int]]) -> torch.Tensor | None:
    """log policy - log reference of each completion, in nats, (completions,); None without both.

    Args:
        parts: the batches.
        places: the completions of each.
    """
    if "reference" not in parts[0].extra or "old" not in parts[0].extra:
        return None
    ratios = [(part.extra["old"] - part.extra["reference"]).sum(1) for part in parts]
    joined = torch.cat([own[: len(at)] for own, at in zip(ratios, places, strict=True)])
    order = _indices([place for part in places for place in part], joined.device)
    return torch.empty_like(joined).index_copy(0, order, joined).double()


def _at(values: torch.Tensor, places: list[int]) -> torch.Tensor:
    return values.index_select(0, _indices(places, values.device))


def _indices(places: list[int], device: torch.device) -> torch.Tensor:
    return moved(torch.tensor(places, dtype=torch.long), device)


def _raise_together(failure: FinrayError | None, world_size: int) -> None:
    """Raise one worker's error on all workers: the others would wait for it otherwise."""
    failures: list[FinrayError | None] = [failure]
    if world_size > 1:
        failures = [None] * world_size
        dist.all_gather_object(failures, failure)
    for error in failures:
        if error is not None:
            raise error
