"""Accepts finray on one GPU, in stages of falling worth; at most 10 minutes.

    gpu.py [--only machine,speed8k] [--seconds 540] [--name h100] [--results FOLDER] [--dry]

Each stage trains in processes of its own and ends no other. After --seconds, no stage starts and no
process goes on. All results go to gpu-NAME.json after every stage; those of stages that are not
chosen stay. --dry runs the stages with tiny models on the CPU, and writes into --folder.

`gpu_carry.sh` gathers what it takes on a machine with torch and without a network.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_probe import STEPS, WAITS
from measure import HERE, RESULTS, commit

QUICK = HERE.parent / "recipes/quickstart"
WORDS = "order rug lamp late broken refund blue chair seven please send again thanks".split()
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}
TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}

AT_ONCE = 4
"""Runs beside each other where no speed is measured."""
RESERVED = 40.0
"""Seconds that are left for comparing estimates with what was seen."""


class Session:
    """Makes models and data in a folder, and trains on them.

    Args:
        folder: keeps models, data and runs.
        dry: True for tiny models on the CPU.
        seconds: of all stages together.
    """

    def __init__(self, folder: Path, dry: bool, seconds: float) -> None:
        self.folder = folder
        self.dry = dry
        self.tflops: float | None = None
        """What a large product reaches; None before the stage `machine`."""
        self._end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        """Seconds until no process that trains goes on."""
        return self._end - RESERVED - time.monotonic()

    def model(self, name: str) -> str:
        """A folder with random weights of a real shape, and the quickstart's tokenizer."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder / "models" / name
        if not folder.is_dir():
            ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
            config = AutoConfig.for_model(**{**(TINY if self.dry else SHAPES[name]), **ids})
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            made.save_pretrained(folder, max_shard_size="4GB")
            del made
            torch.cuda.empty_cache()  # the runs that follow need it
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(QUICK / "base" / file, folder)
        return str(folder)

    def chats(self, words: int, rows: int = 400) -> str:
        """Conversations of about so many words, the same for the same numbers."""
        file = self.folder / f"chat-{words}-{rows}.jsonl"
        if not file.is_file():
            source = random.Random(0)

            def say(mean: float) -> str:
                count = max(2, int(source.lognormvariate(0, 0.5) * mean))
                return " ".join(source.choice(WORDS) for _ in range(count))

            with file.open("w", encoding="utf-8") as stream:
                for _ in range(rows):
                    pair = {"user": say(words / 2), "assistant": say(words / 2)}
                    turns = [{"role": role, "content": text} for role, text in pair.items()]
                    stream.write(json.dumps({"messages": turns}) + "\n")
        return str(file)

    def texts(self, words: int, rows: int = 40) -> str:
        """Plain texts, each longer than a row."""
        file, source = self.folder / f"text-{words}.jsonl", random.Random(1)
        with file.open("w", encoding="utf-8") as stream:
            for _ in range(rows):
                text = " ".join(source.choice(WORDS) for _ in range(2 * words))
                stream.write(json.dumps({"text": text}) + "\n")
        return str(file)

    def tokens(self, count: int) -> int:
        """A length; on the CPU a small one."""
        return 64 if self.dry else count

    def sft(
        self, base: str, length: int, rows: int, words: int = 300, chats: int = 400
    ) -> dict[str, Any]:
        """LoRA on packed conversations: by default 160,000 tokens of them."""
        return {
            "model": {"base": self.model(base)},
            "adapter": {"rank": 16},
            "data": {
                "train": [{"path": self.chats(30 if self.dry else words, chats)}],
                "max_length": self.tokens(length),
                "max_bad_rows": 0.9,
            },
            "optim": {"max_steps": 6 if self.dry else 14, "batch_size": rows,
                      "micro_batch_size": rows, "learning_rate": 1e-4},
            "log": {"every_steps": 2, "to": []},
            "checkpoint": {"every_steps": 1000},
        }  # fmt: skip

    def train(
        self,
        name: str,
        recipe: dict[str, Any],
        limit: float = 120.0,
        *options: str,
        hidden: bool = False,
        goes_on: bool = False,
    ) -> dict[str, Any]:
        """A run in a process of its own: its figures, or how it failed.

        Args:
            name: of the run.
            recipe: without name and storage; with `scale` it trains in a process of the command.
            limit: seconds that it may take.
            options: of the probe.
            hidden: True to hide the GPU from it.
            goes_on: True to resume the run of this name.
        """
        file, facts = self.folder / f"{name}.yaml", self.folder / f"{name}.json"
        storage = self.folder / "runs"
        file.write_text(json.dumps({"name": name, "storage": str(storage), **recipe}), "utf-8")
        facts.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "gpu_probe.py"), str(facts), *options]
        command += ["train", str(file), *([] if goes_on else ["--fresh"])]
        command += [] if "scale" in recipe else ["--local"]
        env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})}
        begun = time.monotonic()
        limit = min(4 * limit if self.dry else limit, self.seconds_left)  # 4: a busy machine's
        if limit <= 0:
            return {"rc": None, "left out": "no time"}
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=limit, env=env
            )
            code, tail = done.returncode, (done.stderr or done.stdout)[-400:]
        except subprocess.TimeoutExpired:
            code, tail = 124, "it took too long"
        seen = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
        seconds = round(time.monotonic() - begun, 1)
        failed = {"tail": tail} if code else {}
        return {"rc": code, "seconds": seconds, **_figures(storage / name), **seen, **failed}

    def train_all(
        self, recipes: dict[str, dict[str, Any]], limit: float = 150.0
    ) -> dict[str, dict[str, Any]]:
        """Runs beside each other, by their names; arguments as for `train`."""
        with ThreadPoolExecutor(1 if self.dry else AT_ONCE) as pool:
            waiting = {n: pool.submit(self.train, n, r, limit) for n, r in recipes.items()}
            return {name: one.result() for name, one in waiting.items()}


def _figures(run: Path) -> dict[str, Any]:
    """What a run's own files say; its speed is that of steps that nobody looks into."""
    metrics, record = run / "metrics.jsonl", run / "run.json"
    if not metrics.is_file() or not record.is_file():
        return {}
    whole = metrics.read_text("utf-8").rpartition("\n")[0]  # a process that is ended may leave less
    lines = [json.loads(line) for line in whole.splitlines()]
    steps = [line for line in lines if "loss" in line]
    values = json.loads(record.read_text("utf-8"))
    timed = [line for line in steps[1:] if line["step"] <= WAITS[0]]
    speeds = [line["tokens_per_second"] for line in timed[1:]]
    kept = ("device", "dtype", "decided", "restarts", "micro_batch_size", "evaluation_parts")
    figures = {
        "losses": [round(line["loss"], 4) for line in steps][:12],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        **{name: values[name] for name in kept if name in values},
    }
    if len(timed) > 1:
        count = timed[-1]["step"] - timed[0]["step"]
        seconds = timed[-1]["seconds"] - timed[0]["seconds"]
        figures["step_seconds"] = round(seconds / count, 5)
    return figures


# the stages


def machine(session: Session) -> dict[str, Any]:
    """The versions, what a large product reaches, and how fast memory is copied."""
    import torch

    seen: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        seen[name] = metadata.version(name)
    seen["grad_dtype"] = "grad_dtype" in dir(torch.Tensor)
    if not torch.cuda.is_available():
        return seen
    seen |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    seen |= {"capability": torch.cuda.get_device_capability(), "nccl": torch.cuda.nccl.version()}
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    pair = [torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2)]
    session.tflops = 2 * 8192**3 / _seconds(partial(torch.mm, *pair)) / 1e12
    halves = torch.empty(2**32, device="cuda", dtype=torch.uint8).chunk(2)
    moved = 2 * len(halves[0]) / _seconds(partial(halves[0].copy_, halves[1]))
    del pair, halves
    torch.cuda.empty_cache()
    return {**seen, "tflops_of_16_bits": round(session.tflops), "copied_gb_s": round(moved / 1e9)}


def _seconds(compute: Callable[[], object]) -> float:
    import torch

    for _ in range(3):
        compute()
    torch.cuda.synchronize()
    begun = time.monotonic()
    for _ in range(10):
        compute()
    torch.cuda.synchronize()
    return (time.monotonic() - begun) / 10


def attention(session: Session) -> dict[str, Any]:
    """Attention by documents against plain attention: its kernel, and what takes its place."""
    command = [sys.executable, str(HERE / "gpu_attention.py"), *(["--dry"] * session.dry)]
    limit = max(1.0, min(90.0, session.seconds_left))
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        return {"rc": done.returncode, "tail": done.stderr[-400:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speed8k(session: Session) -> dict[str, Any]:
    """Packed rows of 8,192 tokens; with the share of the GPU's operations that they reach, the
    share of a step in which its kernels run, and how often the host waits."""
    recipe = session.sft("qwen3-0.6b", 8192, 1)
    recipe["optim"] |= {"max_steps": STEPS}
    return _with_utilisation(session, "speed8k", session.train("speed8k", recipe, 120, "--watch"))


def large(session: Session) -> dict[str, Any]:
    """The shape of Llama-3.1-8B, 8,192 packed tokens, as the estimate places it."""
    recipe = session.sft("llama-3.1-8b", 8192, 2)
    recipe["optim"] |= {"micro_batch_size": "auto", "max_steps": STEPS}
    return _with_utilisation(session, "large", session.train("large", recipe, 240, "--watch"))


def one_document(session: Session) -> dict[str, Any]:
    """As many tokens, one document a row: what attention to packed documents costs."""
    recipe = session.sft("qwen3-0.6b", 8192, 1)
    length = session.tokens(8192)
    data = {"train": [{"path": session.texts(length)}], "max_length": length, "packing": False}
    seen = session.train("one-document", {**recipe, "data": data, "method": "pretrain"})
    return _with_utilisation(session, "one-document", seen)


def speed2k(session: Session) -> dict[str, Any]:
    """Four packed rows of 2,048 tokens."""
    seen = session.train("speed2k", session.sft("qwen3-0.6b", 2048, 4))
    return _with_utilisation(session, "speed2k", seen)


def same(session: Session) -> dict[str, Any]:
    """float32 on the GPU and on the CPU: how far the losses are apart. Twice with `deterministic`,
    in the GPU's own type: they must be equal."""
    recipe = session.sft("qwen3-0.6b", 256, 2, 60)
    wide = {**recipe, "model": {"base": str(QUICK / "base"), "dtype": "float32"}}
    fixed = {**recipe, "model": {"base": str(QUICK / "base")}, "deterministic": True}
    runs = session.train_all({"same-gpu": wide, "same-a": fixed, "same-b": fixed})
    cpu = session.train("same-cpu", wide, hidden=True)
    pairs = zip(runs["same-gpu"].get("losses", ()), cpu.get("losses", ()), strict=False)
    losses = runs["same-a"].get("losses")
    every = (*runs.values(), cpu)
    return {
        "twice_equal": bool(losses) and losses == runs["same-b"].get("losses"),
        "largest_difference_from_cpu": max((abs(a - b) for a, b in pairs), default=None),
        "rc": [run["rc"] for run in every],
        "tails": [run["tail"] for run in every if "tail" in run],
    }


def resumed(session: Session) -> dict[str, Any]:
    """A run in a process with NCCL that goes on from its middle in another one without: with
    dropout, the losses after it must be those of the first."""
    recipe = session.sft("qwen3-0.6b", 256, 2, 60)
    recipe |= {"model": {"base": str(QUICK / "base")}, "deterministic": True}
    recipe["adapter"] = {"rank": 16, "dropout": 0.2}
    recipe["optim"] |= {"max_steps": 8}
    recipe["checkpoint"] = {"every_steps": 4, "keep": 4}
    recipe["log"] = {"every_steps": 1, "to": []}
    first = session.train("resumed", {**recipe, "scale": {"workers": 1}})
    run = session.folder / "runs" / "resumed"
    if first["rc"] != 0:
        return first
    later = [path for path in (run / "checkpoints").iterdir() if path.name.endswith("8")]
    for path in (*later, run / "adapter"):
        shutil.rmtree(path)
    record = json.loads((run / "run.json").read_text("utf-8"))
    (run / "run.json").write_text(json.dumps({**record, "status": "stopped"}), "utf-8")
    second = session.train("resumed", recipe, goes_on=True)
    return {**second, "equal": second.get("losses") == first["losses"], "first": first}


def types(session: Session) -> dict[str, Any]:
    """float16, 4 and 8 bits, checkpointing, and all weights."""
    changes: dict[str, dict[str, Any]] = {
        "bf16": {},
        "fp16": {"dtype": "float16"},
        "nf4": {"quantize": "nf4"},
        "int8": {"quantize": "int8"},
        "checkpointing": {"gradient_checkpointing": True},
        "int8-checkpointing": {"quantize": "int8", "gradient_checkpointing": True},
        "whole": {},
        "whole-fp16": {"dtype": "float16"},
    }
    recipes = {}
    for name, model in changes.items():
        if session.dry and "fp16" in name:  # needs a GPU
            continue
        recipe = session.sft("qwen3-0.6b", 2048, 2, 60)
        recipe["model"] |= {"gradient_checkpointing": False, **model}
        if "whole" in name:
            del recipe["adapter"]
        recipes[f"types-{name}"] = recipe
    return session.train_all(recipes)


def methods(session: Session) -> dict[str, Any]:
    """DPO, KTO, a reward model and GRPO on the quickstart's model."""
    rewards = (QUICK / "rewards.py").read_text("utf-8")
    names = re.findall(r"^def ([a-z]\w*)\(", rewards, re.MULTILINE)
    online = {
        "kind": "grpo",
        "generations": 4,
        "max_completion": 32,
        "rewards": [{"file": f"{QUICK}/rewards.py:{names[0]}"}],
    }
    recipes = {}
    for method in ({"kind": "dpo"}, {"kind": "kto"}, {"kind": "reward"}, online):
        kind = str(method["kind"])
        recipe = session.sft("qwen3-0.6b", 512, 8, 60)
        recipe["model"] = {"base": str(QUICK / "base")}
        recipe["optim"] |= {"max_steps": 8, "micro_batch_size": 4}
        recipe["data"] |= {"max_length": 512}
        if kind != "grpo":
            recipe["data"]["train"] = [{"path": str(QUICK / "pairs.jsonl")}]
        recipes[f"method-{kind}"] = {**recipe, "method": method}
    return session.train_all(recipes)


def out_of_memory(session: Session) -> dict[str, Any]:
    """A microbatch that cannot fit: halved until the run goes on."""
    if session.dry:
        return {"note": "a CPU has no such limit"}
    recipe = session.sft("qwen3-0.6b", 4096, 128, chats=1600)
    recipe["optim"] |= {"max_steps": 2}
    recipe["model"] |= {"gradient_checkpointing": False}
    return session.train("out-of-memory", recipe, 150)


def estimated(session: Session) -> dict[str, Any]:
    """Estimates beside what was seen, of all runs before: the peak, and the speed by the plan."""
    results = {}
    for facts in sorted(session.folder.glob("*.json")):
        run = session.folder / "runs" / facts.stem
        if (run / "run.json").is_file():
            seen = {**_figures(run), **json.loads(facts.read_text("utf-8"))}
            results[facts.stem] = _estimate(_recipe_of(run), seen, _card(session.dry))
    return results


def _recipe_of(run: Path) -> Any:
    """The recipe of a run, with what its GPU decided."""
    from finray.training.config.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    record = json.loads((run / "run.json").read_text("utf-8"))
    if decided := record.get("decided"):
        rows, checkpoints = decided["micro_batch_size"], decided["gradient_checkpointing"]
        recipe = recipe.with_placement(rows, checkpoints)
    if halved := record.get("micro_batch_size"):  # out of memory
        recipe = recipe.with_placement(halved, recipe.model.checkpoints)
    return recipe


def _estimate(recipe: Any, seen: dict[str, Any], card: Any) -> dict[str, Any]:
    from finray.cluster.api.planning import UTILISATION
    from finray.cluster.cards import link_of
    from finray.training.models.memory_estimate import CONTEXT_BYTES, estimate, sizes_of
    from finray.training.models.speed import Device, seconds_per_step

    sizes, peak = sizes_of(recipe), seen.get("peak_gib")
    memory = estimate(recipe, sizes, seen.get("dtype"), seen.get("device", "cuda"))
    own = (memory.peak - CONTEXT_BYTES) / 2**30
    result = {"estimated": round(own, 3), "seen": peak}
    if peak:
        result["error"] = round(own / peak - 1, 4)
    if card is not None and seen.get("tokens_per_second"):
        device = Device(card.tflops * 1e12, card.bandwidth * 1e12, link_of(card, 1))
        tokens = recipe.rows_per_step * recipe.method.sequences_per_row * recipe.data.max_length
        planned = tokens / seconds_per_step(recipe, sizes, device, UTILISATION, tokens, 1)
        result |= {"planned_tokens_per_second": round(planned)}
        result |= {"hours_seen_by_planned": round(planned / seen["tokens_per_second"], 3)}
    return result


def _card(dry: bool) -> Any:
    """The card of the plan's table that this GPU is; None if there is none."""
    import torch

    from finray.cluster.cards import CARDS, parse_gpus
    from finray.training.common.errors import InputError

    if not torch.cuda.is_available():
        return CARDS["l4"] if dry else None
    with suppress(InputError):
        return parse_gpus(torch.cuda.get_device_name())[0]
    return None


def _with_utilisation(session: Session, name: str, seen: dict[str, Any]) -> dict[str, Any]:
    """The figures with `mfu`: needed operations over those that the card's vendor names, and over
    those that its large product reached; attention is to the documents that there are.

    `kernels_share` is the part of a step in which kernels run; the rest the GPU waits for the host.
    """
    from finray.training.models.memory_estimate import sizes_of
    from finray.training.models.speed import training_flops

    run = session.folder / "runs" / name
    if seen["rc"] != 0 or not seen.get("tokens_per_second"):
        return seen
    recipe, card = _recipe_of(run), _card(session.dry)
    attended = _attended(recipe)
    data = recipe.data.model_copy(update={"max_length": attended})
    needed = training_flops(recipe.model_copy(update={"data": data}), sizes_of(recipe))
    tflops = needed * seen["tokens_per_second"] / 1e12
    figures = {"tflops": round(tflops, 3), "tokens_attended": attended}
    if card is not None:
        figures["mfu"] = round(tflops / card.tflops, 3)
    if session.tflops:
        figures["mfu_of_measured"] = round(tflops / session.tflops, 3)
    if kernels := seen.get("kernel_seconds_per_step"):
        figures["kernels_share"] = round(kernels / seen["step_seconds"], 3)
    return {**seen, **figures}


def _attended(recipe: Any) -> int:
    """Mean over the tokens of the length of the document that each is in."""
    from transformers import AutoTokenizer

    if recipe.method.kind == "pretrain":
        return int(recipe.data.max_length)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    rows = Path(recipe.data.train[0].path).read_text("utf-8").splitlines()
    texts = [
        tokenizer.apply_chat_template(json.loads(row)["messages"], tokenize=False) for row in rows
    ]
    sizes = [min(len(ids), recipe.data.max_length) for ids in tokenizer(texts)["input_ids"]]
    return round(sum(size**2 for size in sizes) / sum(sizes))


STAGES: dict[str, Callable[[Session], dict[str, Any]]] = {
    "machine": machine,
    "attention": attention,
    "speed8k": speed8k,
    "large": large,
    "types": types,
    "methods": methods,
    "one_document": one_document,
    "same": same,
    "resumed": resumed,
    "out_of_memory": out_of_memory,
    "speed2k": speed2k,
    "estimated": estimated,
}


def run_stages(names: list[str], session: Session, target: Path) -> None:
    """Run stages while there is time, and write what they return after each.

    The results of stages that do not run now stay in the file.
    """
    kept = target.read_text("utf-8") if target.is_file() else "{}"
    results, code = json.loads(kept), _commit()
    for name in names:
        start = time.monotonic()
        if session.seconds_left <= 0 and name != "estimated":
            result: dict[str, Any] = {"left out": "no time"}
        else:
            try:
                result = STAGES[name](session)
            except Exception as error:  # noqa: BLE001 - one stage must not end the others
                result = {"error": f"{type(error).__name__}: {error}"[:400]}
        seconds = round(time.monotonic() - start, 1)
        results[name] = {"commit": code, "seconds": seconds, **result}
        print(json.dumps({name: results[name]}), flush=True)
        target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """The commit; None on a machine that has the files alone."""
    with suppress(OSError, subprocess.CalledProcessError):
        return commit()
    return None


def main() -> int:
    """Choose stages and run them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"stages, with commas: {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=540.0, help="of all stages together")
    parser.add_argument("--name", help="of the results (default: the GPU's, or dry)")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--folder", type=Path, help="for models and runs (default: a new one)")
    options = parser.parse_args()
    names = (options.only or ",".join(STAGES)).split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"there is no stage {', '.join(unknown)}; those are {', '.join(STAGES)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="finray-gpu-"))
    session = Session(folder, options.dry, options.seconds)
    name = options.name or ("dry" if options.dry else _name_of_gpu())
    results = options.results if not options.dry else folder
    run_stages(names, session, results / f"gpu-{name}.json")
    return 0


def _name_of_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU here; --dry tries the stages with tiny models")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
