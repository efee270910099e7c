"""The stages that training rows go through before they are tokenised: a recipe's `data.curate`."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..common.formatting import shown
from .section import PositiveInt, Section, Share
from .short_forms import as_function, as_sources, as_stages
from .source import RowFunction, Source

PersonalData = Literal["email", "phone", "card", "ip"]


class NormaliseStage(Section):
    """One way to write a text: its Unicode form, line ends as line feeds, and no control characters
    but tabs and line feeds."""

    kind: Literal["normalise"] = "normalise"
    """Texts are written in one way."""
    unicode: Literal["NFC", "NFKC"] = "NFC"
    """NFC joins letters and their accents; NFKC also replaces wide letters, ligatures and the
    like."""


class FilterStage(Section):
    """Rows that are too short, or that repeat themselves, are dropped."""

    kind: Literal["filter"] = "filter"
    """Rows are dropped by their size and repetition."""
    min_tokens: PositiveInt | None = None
    """Fewest tokens of a row's texts together, by the model's tokenizer, without template."""
    max_repetition: Share | None = None
    """Largest share of a text's runs of 5 words that stood in it before; of a row, the text with
    the largest share counts."""

    @model_validator(mode="after")
    def _filters(self) -> Self:
        if self.min_tokens is None and self.max_repetition is None:
            raise ValueError("filter needs min_tokens or max_repetition; add one of them")
        return self


class KeepStage(Section):
    """The user's own decision on each row."""

    kind: Literal["keep"] = "keep"
    """A function of the user's decides on each row."""
    __annotations__["with"] = Annotated[
        RowFunction,
        BeforeValidator(as_function, str | RowFunction),
        Field(
            description='A Python file and a function in it, "rows.py:is_good". It takes a row as '
            "a dict and returns True to keep it, or False."
        ),
    ]

    @property
    def function(self) -> RowFunction:
        """The key `with`, which Python cannot name."""
        function: RowFunction = getattr(self, "with")
        return function


class ScoreStage(Section):
    """Each row gets a number, and rows with low ones are dropped."""

    kind: Literal["score"] = "score"
    """Rows are dropped by a number that a function or a reward model gives them."""
    __annotations__["with"] = Annotated[
        RowFunction | None,
        BeforeValidator(as_function, str | RowFunction | None),
        Field(
            default=None,
            description='A Python file and a function in it, "score.py:quality". It takes a row as '
            "a dict and returns a finite number, which is higher for better rows.",
        ),
    ]
    run: str | None = None
    """Instead of a function: folder of a finished finray run of method reward (relative to the
    recipe's folder, to where the command runs, or to the storage), which scores a row's text. Of a
    pair it is the score of the chosen answer minus that of the rejected one."""
    keep_top: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the rows of all sources together that stays: those with the highest scores."""
    min: float | None = None
    """Smallest score of a row that stays, instead of a share."""

    @property
    def function(self) -> RowFunction | None:
        """The key `with`, which Python cannot name."""
        function: RowFunction | None = getattr(self, "with")
        return function

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.function is None) == (self.run is None):
            raise ValueError(
                "score needs with, a function, or run, a reward model; set one of them"
            )
        if (self.keep_top is None) == (self.min is None):
            raise ValueError("score needs keep_top, a share, or min, a score; set one of them")
        return self


LANGUAGES = tuple(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb
    co cs cv cy da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv
    he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb
    lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new
    nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl
    so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf
    yi yo yue zh
    """.split()
)
"""Codes of the languages that can be told apart: ISO 639, of two letters where there are such."""


class LanguageStage(Section):
    """Rows in other languages are dropped."""

    kind: Literal["language"] = "language"
    """Rows are dropped by their language."""
    keep: Annotated[list[str], Field(min_length=1)]
    """Codes of the languages to keep, such as [en, de]. The language is that of a row's texts
    together, without system prompts; a row without letters has none, and stays."""
    min_confidence: Share = 0.0
    """Rows whose language is less probable than this are dropped, too; 0.65 is usual for pages of
    the web."""

    @model_validator(mode="after")
    def _languages_exist(self) -> Self:
        if unknown := [code for code in self.keep if code not in LANGUAGES]:
            raise ValueError(
                f"keep: there is no language {shown(unknown[0])}; name some of: "
                f"{', '.join(LANGUAGES)}"
            )
        return self


class RedactStage(Section):
    """Personal data is masked, by patterns: [email], [phone], [card], [ip]."""

    kind: Literal["redact"] = "redact"
    """Personal data is masked."""
    of: Annotated[list[PersonalData], Field(min_length=1)] = ["email", "phone", "card", "ip"]
    """What is masked: addresses of mail; telephone numbers with + and a country, in brackets, in
    three groups, or with a leading 0 in usual groups; numbers of cards (their check digit is
    computed); addresses of version 4 and 6."""
    drop: bool = False
    """Drop the rows that hold any, instead."""


class NearDuplicates(Section):
    """Which rows count as nearly equal."""

    jaccard: Annotated[float, Field(ge=0.3, lt=1.0)] = 0.8
    """Smallest share of common word runs (of those that either row has) of two rows of which one is
    dropped. It is computed for each pair that the sketches propose."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Numbers in a row's sketch (MinHash). They are compared in bands, so that 99.5% of the pairs
    at the threshold are proposed; a low threshold needs more numbers."""
    ngram: Annotated[int, Field(ge=1, le=50)] = 5
    """Words in a run. A character of a script without spaces counts as a word."""

    @model_validator(mode="after")
    def _bands_exist(self) -> Self:
        if band_rows(self) == 0:
            raise ValueError(
                f"permutations: {self.permutations} are too few to propose 99.5% of the pairs at "
                f"jaccard {self.jaccard:g}; raise permutations or jaccard"
            )
        return self


RECALL = 0.995
"""Share of the pairs at the threshold that bands have to propose."""


def band_rows(near: NearDuplicates) -> int:
    """Numbers in a band: the most with which enough pairs are proposed; 0 if there are none."""
    suitable = [
        rows
        for rows in range(1, near.permutations + 1)
        if 1 - (1 - near.jaccard**rows) ** (near.permutations // rows) >= RECALL
    ]
    return max(suitable, default=0)


class DeduplicateStage(Section):
    """Of equal rows of all sources together, the first one stays; with `near`, of nearly equal
    ones too."""

    kind: Literal["deduplicate"] = "deduplicate"
    """Of equal rows one stays."""
    near: NearDuplicates | None = None
    """Also drop rows that are nearly equal: of all that are linked with one another, the first one
    stays. Absent: equal rows only."""


class DecontaminateStage(Section):
    """Training rows that share a run of words with evaluation data are dropped."""

    kind: Literal["decontaminate"] = "decontaminate"
    """Training rows that contain evaluation data are dropped."""
    against: Annotated[
        list[Source], BeforeValidator(as_sources, str | Source | list[Source | str])
    ] = []
    """Evaluation data beside data.eval, which always counts. Rows of any shape: the texts of a
    shape that finray reads, else all texts."""
    ngram: Annotated[int, Field(ge=3, le=100)] = 13
    """Words in a run. A shorter row is compared as a whole. A run of more than ten different
    evaluation rows is a prompt's template, and does not count."""


Stage = Annotated[
    NormaliseStage
    | FilterStage
    | KeepStage
    | LanguageStage
    | RedactStage
    | ScoreStage
    | DeduplicateStage
    | DecontaminateStage,
    Field(discriminator="kind"),
]
_Name = Literal["normalise", "redact", "deduplicate", "decontaminate"]
Stages = Annotated[list[Stage], BeforeValidator(as_stages, list[Stage | _Name])]


class MixSettings(Section):
    """The sources' shares, from their sizes."""

    temperature: Annotated[float, Field(ge=0.0, le=1.0)]
    """A source of n rows gets a share proportional to n to the power of this: 1 leaves the sizes, 0
    makes all sources equal. Rows are counted after curation; their total stays."""


class HoldoutSettings(Section):
    """Training rows that are set aside for evaluation, in groups."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the groups that is held out."""
    group_by: str | None = None
    """A column: rows with the same value stay on one side. Rows that are equal or nearly equal do
    so in any case."""
