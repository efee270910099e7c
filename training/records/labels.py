"""Labels of metrics for people: their titles, their number formats, and the key metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common import formatting
from ..config.eval_metrics import ANSWER_METRICS
from ..config.metric import MODES
from .charts import Format, value_text


@dataclass(frozen=True)
class MetricLabel:
    """The title of a metric, and the format of its values."""

    title: str
    format: Format = "loss"

    def write(self, value: Any) -> str:
        """The value as text; – if it is missing."""
        return value_text(value, self.format)

    def difference(self, old: Any, new: Any) -> str:
        """The change as text, in percentage points for a share; empty if a value is missing."""
        if not (formatting.is_number(old) and formatting.is_number(new)):
            return ""
        return f"{100 * (new - old):+.1f}" if self.format == "percent" else f"{new - old:+.3f}"


LABELS = {
    **{
        name: MetricLabel(fact.title, "percent" if fact.largest == 1.0 else "loss")
        for name, fact in ANSWER_METRICS.items()
    },
    "loss": MetricLabel("loss"),
    "exact_match": MetricLabel("exact match", "percent"),
    "token_accuracy": MetricLabel("token accuracy", "percent"),
    "entropy": MetricLabel("entropy"),
    "reward": MetricLabel("reward"),
    "reward_std": MetricLabel("reward spread within a group"),
    "reward_accuracy": MetricLabel("reward accuracy", "percent"),
    "reward_margin": MetricLabel("reward margin"),
    "kl": MetricLabel("KL to the reference"),
    "completion_length": MetricLabel("completion length", "count"),
    "clipped": MetricLabel("clipped share", "percent"),
    "truncated": MetricLabel("truncated share", "percent"),
    "expert_load": MetricLabel("load of the busiest expert (1 is even)"),
    "idle_experts": MetricLabel("experts without a token", "percent"),
}
"""Labels by metric name; the held-out value of a metric has the prefix `eval_`."""

_KEY_METRICS = ("eval_reward", "eval_reward_accuracy", "eval_kl", "eval_loss")
_MATCH = "exact_match"


def key_metrics(*records: Mapping[str, Any]) -> list[str]:
    """Those of some metrics that describe a run best, the easiest to understand first.

    They include the measures of answers that a recipe names in eval.metrics.
    """
    names = {name for record in records for name in record}
    own = sorted(filter(_is_of_answers, names))
    if _MATCH in names and f"eval_{_MATCH}" in own:  # the same, of the same prompts
        own.remove(f"eval_{_MATCH}")
    return [name for name in (_MATCH, *own, *_KEY_METRICS) if name in names]


def _is_of_answers(name: str) -> bool:
    bare = name.removeprefix("eval_")
    is_declared = bare in LABELS or bare in MODES or "/" in bare
    return name != bare and (bare in ANSWER_METRICS or not is_declared)


def label_of(name: str) -> MetricLabel:
    """The label of a metric. An unknown name, such as a user's reward, becomes its own title."""
    bare = name.removeprefix("eval_")
    label = LABELS.get(bare) or MetricLabel(bare.replace("_", " "))
    return MetricLabel(f"held-out {label.title}", label.format) if name != bare else label


def adapted_text(adapted: dict[str, Any]) -> str:
    """What an adapter changes: attention 8 of 8, experts 4 of 4; not routers, head (97.1% of …)."""
    kinds = {title: row for title, row in adapted.items() if title != "all"}
    reached = [
        f"{title} {formatting.count(row['modules'])} of {formatting.count(row['of'])}"
        for title, row in kinds.items()
        if row["modules"]
    ]
    left = [title for title, row in kinds.items() if not row["modules"]]
    share = formatting.percent(adapted.get("all", {}).get("share"))
    without = f"; not {', '.join(left)}" if left else ""
    return f"{', '.join(reached) or 'no matrix'}{without} ({share} of the layers' values)"
