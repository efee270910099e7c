"""DPO's family of losses: functions of the log-ratios of policy and reference.

Each takes pairs and settings and returns the losses, (pairs,). In the formulas, w and l are the
log-ratios of the chosen and the rejected answer, and s is the difference of their divergence
scores.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from ..config.methods import DpoLoss, DpoMethod
from .preference import Answers, smoothed_sigmoid_loss


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers under the policy and the reference, with their log-ratios."""

    policy: Answers
    reference: Answers
    chosen_ratios: torch.Tensor
    """log policy(y) - log reference(y) of the chosen answers, (pairs,)."""
    rejected_ratios: torch.Tensor
    chosen_scores: torch.Tensor
    """`divergence_score` of the log-ratios, (pairs,); for reverse_kl the log-ratios themselves."""
    rejected_scores: torch.Tensor

    @classmethod
    def of(cls, policy: Answers, reference: Answers, settings: DpoMethod) -> "Pairs":
        """Compute log-ratios and scores from the answers under both models."""
        ratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        scores = (divergence_score(ratio, settings) for ratio in ratios)
        return cls(policy, reference, *ratios, *scores)

    @property
    def difference(self) -> torch.Tensor:
        """s: the chosen answer's score minus the rejected one's, (pairs,)."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_difference(self) -> torch.Tensor:
        """s with the scores divided by the answers' numbers of tokens, (pairs,)."""
        policy = self.policy
        return (
            self.chosen_scores / policy.chosen_tokens
            - self.rejected_scores / policy.rejected_tokens
        )


def divergence_score(log_ratio: torch.Tensor, settings: DpoMethod) -> torch.Tensor:
    """f'(t) of the f-divergence at t = exp(log_ratio), without constants that cancel out.

    Wang et al., 2023, https://arxiv.org/abs/2309.16240, table 1.
    """
    if settings.divergence == "forward_kl":
        return 1 - torch.exp(-log_ratio)
    if settings.divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    if settings.divergence == "alpha":
        power = settings.divergence_alpha - 1
        return (torch.exp((power * log_ratio).clamp(max=80.0)) - 1) / power
    return log_ratio


def sigmoid(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """-log sigmoid(beta s): Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7.

    With label smoothing, cDPO: Mitchell, 2023, https://ericmitchell.ai/cdpo.pdf.
    """
    return smoothed_sigmoid_loss(settings.beta * pairs.difference, settings.label_smoothing)


def sigmoid_norm(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """`sigmoid` with scores per token: Lambert et al., 2024, https://arxiv.org/abs/2411.15124."""
    return -logsigmoid(settings.beta * pairs.mean_difference)


def hinge(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """max(0, 1 - beta s): SLiC, Zhao et al., 2023, https://arxiv.org/abs/2305.10425."""
    return torch.relu(1 - settings.beta * pairs.difference)


def ipo(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """(s - 1 / (2 beta))^2 with scores per token: Azar et al., 2023,
    https://arxiv.org/abs/2310.12036, eq. 17."""
    return (pairs.mean_difference - 1 / (2 * settings.beta)) ** 2


def exo_pair(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """KL(softmax(beta w, beta l) || (1 - e, e)): Ji et al., 2024, https://arxiv.org/abs/2402.00856,
    eq. 16; e is label_smoothing."""
    logits, wrong = settings.beta * pairs.difference, settings.label_smoothing
    first = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-wrong))
    return first + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(wrong))


def nca_pair(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Noise contrastive alignment: Chen et al., 2024, https://arxiv.org/abs/2402.05369."""
    chosen = settings.beta * pairs.chosen_ratios
    rejected = settings.beta * pairs.rejected_ratios
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def robust(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """An estimate that is unbiased if labels are flipped: Chowdhury et al., 2024,
    https://arxiv.org/abs/2403.00409."""
    logits, wrong = settings.beta * pairs.difference, settings.label_smoothing
    return (wrong * logsigmoid(-logits) - (1 - wrong) * logsigmoid(logits)) / (1 - 2 * wrong)


def bco_pair(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Binary classification of both answers, without the reward shift: Jung et al., 2024,
    https://arxiv.org/abs/2404.04656."""
    beta = settings.beta
    return -logsigmoid(beta * pairs.chosen_ratios) - logsigmoid(-beta * pairs.rejected_ratios)


def sppo_hard(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2: Wu et al., 2024,
    https://arxiv.org/abs/2405.00675, eq. 4.7 with certain preferences."""
    aim = 0.5 / settings.beta
    return (pairs.chosen_ratios - aim) ** 2 + (pairs.rejected_ratios + aim) ** 2


def aot(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Sorted margins of the policy against sorted margins of the reference: Melnyk et al., 2024,
    https://arxiv.org/abs/2406.05882. It sorts the pairs of one forward pass."""
    policy = (pairs.policy.chosen - pairs.policy.rejected).sort().values
    reference = (pairs.reference.chosen - pairs.reference.rejected).sort().values
    return smoothed_sigmoid_loss(settings.beta * (policy - reference), settings.label_smoothing)


def aot_unpaired(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Like `aot`, with sorted log-ratios of the chosen against those of the rejected answers."""
    difference = pairs.chosen_ratios.sort().values - pairs.rejected_ratios.sort().values
    return smoothed_sigmoid_loss(settings.beta * difference, settings.label_smoothing)


def apo_zero(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Raises chosen answers and lowers rejected ones: D'Oosterlinck et al., 2024,
    https://arxiv.org/abs/2408.06266, eq. 7."""
    up = 1 - torch.sigmoid(settings.beta * pairs.chosen_ratios)
    return up + torch.sigmoid(settings.beta * pairs.rejected_ratios)


def apo_down(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Lowers chosen answers, and rejected ones more: as `apo_zero`, eq. 8."""
    difference = pairs.chosen_ratios - pairs.rejected_ratios
    down = torch.sigmoid(settings.beta * pairs.chosen_ratios)
    return down + 1 - torch.sigmoid(settings.beta * difference)


def discopop(pairs: Pairs, settings: DpoMethod) -> torch.Tensor:
    """Log-ratio modulated loss: Lu et al., 2024, https://arxiv.org/abs/2406.08414, eq. 5."""
    logits = settings.beta * pairs.difference
    mix = torch.sigmoid(logits / settings.discopop_tau)
    return (mix - 1) * logsigmoid(logits) + mix * torch.exp(-logits)


PAIR_LOSSES: dict[DpoLoss, Callable[[Pairs, DpoMethod], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
"""All losses of `DpoMethod.losses` except sft, which does not depend on log-ratios."""
