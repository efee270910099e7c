"""What secrets look like: by their own form, or by what stands before them."""

import re
from typing import NamedTuple

_START = r"(?<![A-Za-z0-9])"
"""A token begins after anything but a letter or a digit."""
_MIXED = r"(?=[\w-]{0,200}[0-9])(?=[\w-]{0,200}[A-Z])"
"""What follows holds a digit and a capital, as random characters do and words do not."""
_RANDOM = r"(?=[^\s\"']{0,200}[0-9])(?=[^\s\"']{0,200}[A-Za-z])"
"""What follows holds a digit and a letter."""
_WRITTEN = r"(?![$<{%*\[(])"
"""What follows is no ${NAME}, {name}, <name> or *** in place of a value."""

_BY_FORM = {
    "a Hugging Face token": (
        r"hf_[A-Za-z0-9]{24,}",
        rf"hf_{_MIXED}[A-Za-z0-9]{{16,}}",
        r"api_org_[A-Za-z0-9]{20,}",
    ),
    "a Weights & Biases key": (r"wandb_v1_\w{16,}",),
    "an AWS key": (
        r"A(?:KI|SI|BI|CC)A[A-Z0-9]{16}(?![A-Za-z0-9])",
        r"ABSK[A-Za-z0-9+/]{60,}=*",
        r"(?:IQoJb3JpZ2lu|FwoGZXIvYXdz|FQoGZXIvYXdz)[A-Za-z0-9+/=]{16,}",
    ),
    "an Azure key": (
        r"[\w~.]{3}[78]Q~[\w~.-]{31,34}",
        r"[A-Za-z0-9/+]{76}\+(?:ASt|AMC|ARm|ACR)[A-Za-z0-9/+]{5,}={0,2}",
        r"[A-Za-z0-9/+]{33,42}A(?:IoT|SbT|EhS|zSe|zFu|CDb)[A-Za-z0-9/+]{5,}={0,2}",
    ),
    "a Google key": (
        r"AIza[\w-]{30,}",
        r"ya29\.[\w-]{20,}",
        r"GOCSPX-[\w-]{20,}",
        r"GOOG[A-Z0-9]{20,}",
        r"1//0[\w-]{30,}",
        r"AQ\.Ab[\w-]{30,}",
    ),
    "a Slack token": (
        r"xox[a-z](?:\.xox[a-z])?-[A-Za-z0-9-]{10,}",
        r"xapp-\d-[A-Za-z0-9-]{10,}",
    ),
    "a GitHub token": (r"gh[pousr]_[A-Za-z0-9]{30,}", r"github_pat_\w{22,}"),
    "a GitLab token": (
        r"gl(?:pat|dt|rtr?|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[\w.-]{20,}",
        r"GR1348941[\w-]{20,}",
    ),
    "an npm token": (r"npm_[A-Za-z0-9]{30,}",),
    "a PyPI token": (r"pypi-[\w-]{50,}",),
    "a Docker token": (r"dckr_(?:pat|oat)_[\w-]{20,}",),
    "an NVIDIA key": (r"nvapi-[\w-]{20,}",),
    "an API key": (
        r"sk-(?:[a-z0-9]{2,8}-){0,3}[A-Za-z0-9]{20,}[\w-]*",
        rf"sk-{_MIXED}[\w-]{{20,}}",
        rf"(?:gsk|fw|r8|rpa|jina|tgp_v1|dop_v1|glsa|lin_api|shpat)_{_RANDOM}[A-Za-z0-9]{{24,}}",
        rf"tvly-{_RANDOM}[A-Za-z0-9-]{{24,}}",
        r"(?:xai|pplx|csk)-[A-Za-z0-9]{30,}",
        r"hvs\.[\w-]{24,}",
        r"lsv2_(?:pt|sk)_\w{32,}",
        r"[rs]k_(?:live|test)_[A-Za-z0-9]{20,}",
        r"SG\.[\w-]{16,}\.[\w-]{30,}",
        r"dapi[0-9a-f]{32}",
        r"SK[0-9a-f]{32}(?![A-Za-z0-9])",
        r"AGE-SECRET-KEY-1[0-9A-Z]{40,}",
    ),
    "a bot's token": (r"\d{8,10}:AA[\w-]{32,}", r"[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,}"),
    "a JSON Web Token": (
        r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*){0,3}",
        r"eyJhcGlf[A-Za-z0-9+/=_-]{40,}",
    ),
}
"""Tokens that are recognised by their own form."""

_NAMED = (
    r"(?:(?:secret|access|api|account|private|shared|signing|encryption|master|license)"
    r"[_-]?(?:access[_-]?)?(?:key|signature)|(?:api|auth|access|refresh|session|bearer|bot)"
    r"[_-]?token|(?:client|api|webhook|app)[_-]?secret|pass(?:word|wd|phrase))"
)
"""Names of settings that hold secrets."""
_PARAMETER = (
    r"(?:[a-z0-9.-]{0,40}[_.-])?(?:[a-z0-9]{0,20}(?:secret|passw(?:or)?d|credentials?|signature)"
    r"[a-z0-9_-]{0,20}|[a-z]{0,20}token|token[_-][a-z_-]{1,20}|pass(?:phrase)?|pwd|sig|auth"
    r"|authorization|[a-z0-9_-]{0,20}(?:access|api|secret|account|subscription|function)[_-]?key"
    r"(?:[_-]?id)?)"
)
"""Names of parameters of a URI that hold secrets."""

_BY_PLACE = {
    "a private key": (
        r"(?P<name>-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)"
        r"(?:(?!-----|\[secret\])[\s\S])+(?:-----END [A-Z0-9 ]{0,40}-----)?",
    ),
    "a key in a connection string": (
        rf"(?i:(?P<name>(?:AccountKey|SharedAccessKey|SharedAccessSignature)=)){_WRITTEN}"
        r"[^;\s\"']{16,}",
        rf"(?i:(?P<name>;\s{{0,3}}(?:password|pwd)=)){_WRITTEN}[^;\s\"'()]{{4,}}",
        rf"(?i:(?P<name>(?<![a-z])(?:password|pwd)=)){_WRITTEN}[^;\s\"'()]{{4,200}}(?=;)",
    ),
    "the address of a webhook": (
        r"(?P<name>(?:hooks\.slack\.com/(?:services|workflows|triggers)|"
        r"discord(?:app)?\.com/api/webhooks|office\.com/webhook\w?\w?"
        rf"|chat\.googleapis\.com/v1/spaces)/){_WRITTEN}[\w./?=&%@+-]{{16,}}",
    ),
    "a user name with a password in a URI": (
        # The password ends at the last @ of the host's part…
        rf"(?P<name>://)[^\s@/?#:\"'\[]{{0,200}}:{_WRITTEN}[^\s/?#\"']{{1,500}}(?=@)",
        # … or holds a slash, as keys of AWS do: but host:port/path@version has none.
        rf"(?P<name>://)[^\s@/?#:\"'\[]{{1,200}}:(?!\d{{1,5}}(?:[/?]|$)){_WRITTEN}"
        r"[^\s@\"']{1,500}(?=@)",
    ),
    "a token in a URI": (
        # A container@account of Azure and a user@host of SSH are names.
        r"(?P<name>(?<![A-Za-z0-9+.-])(?!abfss?:|wasbs?:|ssh:|sftp:|hdfs:)[a-z][a-z0-9+.-]{1,20}://)"
        r"(?:(?=[^@/\s]{0,200}\d)[\w.~%+=-]{12,}|[\w.~%+=-]{20,})(?=@)",
    ),
    "credentials in the query of a URI": (
        rf"(?i:(?P<name>[?&;]{_PARAMETER}=)){_WRITTEN}[^&\s'\"]+",
        rf"(?i:(?P<name>[?&](?:key|code)=)){_WRITTEN}{_RANDOM}[\w+/=.-]{{16,}}",
        r"(?P<name>(?:^|(?<=[\s\"',;])|(?<=SharedAccessSignature ))sig=)[A-Za-z0-9%+/=]{20,}",
    ),
    "an authorization header": (
        r"(?i:(?P<name>authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:(?:bearer|basic|token)\s{1,3})?))"
        rf"{_WRITTEN}{_RANDOM}[\w.~+/=-]{{16,}}",
        rf"(?i:(?P<name>(?<![a-z])bearer\s{{1,3}})){_RANDOM}[\w.~+/=-]{{16,}}",
    ),
    "a registry's password": (
        r"(?P<name>\"auth\"\s{0,3}:\s{0,3}\")[A-Za-z0-9+/=]{16,}",
        rf"(?P<name>:_(?:authToken|password|auth)\s{{0,3}}=\s{{0,3}}){_WRITTEN}[^\s\"']{{8,}}",
    ),
    "a key": (
        rf"(?i:(?P<name>{_NAMED}[\"']?\s{{0,3}}[:=]\s{{0,3}}(?P<quote>[\"']))){_RANDOM}"
        r"[A-Za-z0-9+/=_.~!@#%^&*-]{12,}(?=(?P=quote))",
        rf"(?i:(?P<name>{_NAMED}\s{{0,3}}[:=]\s{{0,3}})){_RANDOM}[A-Za-z0-9+/=]{{20,}}"
        r"(?![A-Za-z0-9+/=_.(\[-])",
    ),
}
"""Secrets that are recognised by what stands before them, which stays (the group `name`)."""

_NEEDED = {
    "a private key": "PRIVATE KEY",
    "a key in a connection string": "=",
    "the address of a webhook": "/",
    "a user name with a password in a URI": "://",
    "a token in a URI": "://",
    "credentials in the query of a URI": "=",
}
"""A part of each text that holds a secret of the kind."""
_LITERAL = re.compile(r"[\w-]*(?![\w?*{-])")


class Pattern(NamedTuple):
    """How secrets of a kind are recognised."""

    kind: str
    needed: str
    """A part of each text that the expression matches; most texts lack it, which is soon seen."""
    expression: re.Pattern[str]


def _by_form(kind: str, form: str) -> Pattern:
    match = _LITERAL.match(form)
    literal = match[0] if match else ""
    # A prefix such as hf_ is no part of a word.
    start = "" if literal.endswith("_") else _START
    return Pattern(kind, literal, re.compile(f"{start}{form}[\\w-]*"))


PATTERNS = (
    *(_by_form(kind, form) for kind, forms in _BY_FORM.items() for form in forms),
    *(
        Pattern(kind, _NEEDED.get(kind, ""), re.compile(form))
        for kind, forms in _BY_PLACE.items()
        for form in forms
    ),
)
