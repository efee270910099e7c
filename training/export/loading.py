"""Python code that loads an exported result with transformers and PEFT, without finray."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["adapter", "merged", "model"]

_QUANTISATION = {
    "nf4": (
        "BitsAndBytesConfig("
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
    ),
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
}


@dataclass(frozen=True)
class ExportedModel:
    """The properties of an exported result that matter for loading it."""

    kind: Kind
    """adapter: without its base. merged: an adapter merged into its base. model: a full model."""
    is_classifier: bool
    """True if it scores texts, False if it generates them."""
    model_class: str
    """Name of the transformers auto class that loads it."""
    labels: int
    """Number of outputs of a classifier."""
    base: str
    """Hub id or absolute folder of the base model."""
    revision: str | None
    quantize: str
    """Quantisation of the base while the adapter was trained: none, nf4 or int8."""
    has_chat_template: bool
    rows: int | None = None
    """Rows of the embedding under an adapter that added tokens; None if the base has enough."""
    unquantised: tuple[str, ...] = ()
    """Endings of the names of layers that must not be quantised: PEFT adds to their weights."""
    stored: str = "none"
    """How the weights of a whole model are quantised in the folder: none, nf4 or int8."""
    has_stops: bool = False
    """True if generation_config.json beside an adapter says where an answer ends."""

    @property
    def base_is_public(self) -> bool:
        """True if the base's name is a hub id, False for a folder of this machine."""
        return not Path(self.base).is_absolute()

    def loading_lines(self, folder: Path) -> list[str]:
        """The lines of code that load it from a folder, without imports."""
        if self.kind != "adapter":
            return [
                f"model = {self.model_class}.from_pretrained({_quoted(str(folder))})",
                f"tokenizer = AutoTokenizer.from_pretrained({_quoted(str(folder))})",
            ]
        lines = [
            self._base_line(_quoted(self.base)),
            *self._room_lines(),
            f"model = PeftModel.from_pretrained(base, {_quoted(str(folder))})",
        ]
        return lines + self._stop_lines(_quoted(str(folder)))

    def program(self) -> str:
        """A program that loads it from its own folder and uses it, without local paths."""
        return "\n".join([*self._imports(), "", *self._loading(), "", *self._using()])

    def _base_line(self, base: str) -> str:
        arguments = [base]
        if self.base_is_public and self.revision is not None:
            arguments.append(f"revision={_quoted(self.revision)}")
        if self.is_classifier:
            arguments.append(f"num_labels={self.labels}")
        if self.quantize != "none":
            arguments.append(f"quantization_config={self._quantisation()}")
        arguments.append('dtype="auto"')
        return f"base = {self.model_class}.from_pretrained({', '.join(arguments)})"

    def _quantisation(self) -> str:
        """A BitsAndBytesConfig. Experts stay in 16 bits: bitsandbytes has no layer for them."""
        config = _QUANTISATION[self.quantize]
        if not self.unquantised:
            return config
        kept = ", ".join(_quoted(name) for name in ("lm_head", "score", *self.unquantised))
        return f"{config.removesuffix(')')}, llm_int8_skip_modules=[{kept}])"

    def _room_lines(self) -> list[str]:
        """The adapter holds the rows of added tokens, of which the base lacks some."""
        return [] if self.rows is None else [f"base.resize_token_embeddings({self.rows})"]

    def _stop_lines(self, folder: str) -> list[str]:
        """PEFT leaves the base's generation_config, which may not stop where the adapter does."""
        if not self.has_stops:
            return []
        return [f"model.generation_config = GenerationConfig.from_pretrained({folder})"]

    def _imports(self) -> list[str]:
        names = [self.model_class, "AutoTokenizer"]
        if self.has_stops:
            names.append("GenerationConfig")
        if self.kind != "adapter":
            return [f"from transformers import {', '.join(names)}"]
        if self.quantize != "none":
            names.append("BitsAndBytesConfig")
        config = "" if self.base_is_public else "PeftConfig, "
        return [
            f"from peft import {config}PeftModel",
            f"from transformers import {', '.join(names)}",
        ]

    def _loading(self) -> list[str]:
        lines = ['folder = "."  # this folder; or its path, or its hub id']
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
        if self.kind == "adapter":
            name = _quoted(self.base)
            if not self.base_is_public:
                lines.append("name = PeftConfig.from_pretrained(folder).base_model_name_or_path")
                name = "name"
            lines.append(self._base_line(name))
            lines += self._room_lines()
            lines.append("model = PeftModel.from_pretrained(base, folder)")
            lines += self._stop_lines("folder")
            if self.is_classifier:
                lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
        else:
            lines.append(f'model = {self.model_class}.from_pretrained(folder, dtype="auto")')
        return lines

    def _using(self) -> list[str]:
        if self.is_classifier:
            return self._scoring()
        if self.has_chat_template:
            lines = [
                'messages = [{"role": "user", "content": "Hello!"}]',
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
                ").to(model.device)",
            ]
        else:
            lines = ['inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)']
        return [
            *lines,
            "output = model.generate(**inputs, max_new_tokens=64)",
            'answer = output[0, inputs["input_ids"].shape[1]:]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]

    def _scoring(self) -> list[str]:
        lines = ['text = "A text to score."']
        if self.has_chat_template:
            lines = [
                'turns = [("user", "How are you?"), ("assistant", "Fine, thanks.")]',
                'messages = [{"role": role, "content": content} for role, content in turns]',
                "text = tokenizer.apply_chat_template(messages, tokenize=False)",
            ]
        return [
            *lines,
            'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
            "print(model(**inputs.to(model.device)).logits)",
        ]


def _quoted(text: str) -> str:
    """A Python string literal with double quotes."""
    return json.dumps(text, ensure_ascii=False)
