"""Accepts finray on one GPU, in stages of falling worth; at most 12 minutes.

    gpu.py [--only machine,speed8k] [--seconds 630] [--name h100] [--dry]

Each stage trains in processes of its own and ends no other. After --seconds, no stage starts and no
process goes on. All results go to results/gpu-NAME.json after every stage; those of stages that are
not chosen stay. --dry runs the stages with tiny models on the CPU, and writes into --folder.
"""

import argparse
import atexit
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
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        self._end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of all stages."""
        return self._end - time.monotonic()

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
        file = self.folder / f"chat-{words}.jsonl"
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

    def sft(self, base: str, length: int, rows: int, words: int = 300) -> dict[str, Any]:
        """LoRA on packed conversations."""
        return {
            "model": {"base": self.model(base)},
            "adapter": {"rank": 16},
            "data": {
                "train": [{"path": self.chats(30 if self.dry else words)}],
                "max_length": self.tokens(length),
                "max_bad_rows": 0.9,
            },
            "optim": {"max_steps": 6 if self.dry else 14, "batch_size": rows,
                      "micro_batch_size": rows, "learning_rate": 1e-4},
            "log": {"every_steps": 2, "to": []},
            "checkpoint": {"every_steps": 1000},
        }  # fmt: skip

    def train(
        self, name: str, recipe: dict[str, Any], limit: float = 120.0, hidden: bool = False
    ) -> dict[str, Any]:
        """A run in a process of its own: its figures, or how it failed.

        Args:
            name: of the run.
            recipe: without name and storage.
            limit: seconds that it may take.
            hidden: True to hide the GPU from it.
        """
        file, facts = self.folder / f"{name}.yaml", self.folder / f"{name}.json"
        storage = self.folder / "runs"
        file.write_text(json.dumps({"name": name, "storage": str(storage), **recipe}), "utf-8")
        facts.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--probe", str(facts), "train", str(file), "--fresh"]
        env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})}
        begun = time.monotonic()
        limit = min(4 * limit if self.dry else limit, self.seconds_left)  # 4: a busy machine's
        if limit <= 0:
            return {"rc": None, "left out": "no time"}
        try:
            done = subprocess.run(
                [*command, "--local"],
                check=False,
                capture_output=True,
                text=True,
                timeout=limit,
                env=env,
            )
            code, tail = done.returncode, (done.stderr or done.stdout)[-400:]
        except subprocess.TimeoutExpired:
            code, tail = 124, "it took too long"
        seen = json.loads(facts.read_text("utf-8")) if facts.is_file() else {}
        seconds = round(time.monotonic() - begun, 1)
        failed = {"tail": tail} if code else {}
        return {"rc": code, "seconds": seconds, **_figures(storage / name), **seen, **failed}


def _figures(run: Path) -> dict[str, Any]:
    """What a run's own files say."""
    metrics, record = run / "metrics.jsonl", run / "run.json"
    if not metrics.is_file() or not record.is_file():
        return {}
    whole = metrics.read_text("utf-8").rpartition("\n")[0]  # a process that is ended may leave less
    lines = [json.loads(line) for line in whole.splitlines()]
    steps = [line for line in lines if "loss" in line]
    values = json.loads(record.read_text("utf-8"))
    speeds = [line["tokens_per_second"] for line in steps[2:]]
    kept = ("device", "dtype", "decided", "restarts", "micro_batch_size", "evaluation_parts")
    return {
        "losses": [round(line["loss"], 4) for line in steps][:12],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        **{name: values[name] for name in kept if name in values},
    }


def probe(facts: Path, arguments: list[str]) -> int:
    """The command finray in this process, with what only it can see: the peak of its memory."""
    import torch

    def write() -> None:
        seen = {}
        if torch.cuda.is_available():
            seen = {
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            }
        facts.write_text(json.dumps(seen), encoding="utf-8")

    atexit.register(write)
    from finray.cluster.cli.main import main

    return main(arguments)


# the stages


def machine(session: Session) -> dict[str, Any]:
    """The versions, and what a large product reaches."""
    import torch

    seen: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        torch.mm(left, right)
        torch.cuda.synchronize()
        begun = time.monotonic()
        for _ in range(10):
            torch.mm(left, right)
        torch.cuda.synchronize()
        tflops = 10 * 2 * 8192**3 / (time.monotonic() - begun) / 1e12
        del left, right
        torch.cuda.empty_cache()
        seen |= {"gpu": torch.cuda.get_device_name(), "tflops_of_16_bits": round(tflops)}
    return seen


def speed8k(session: Session) -> dict[str, Any]:
    """Packed rows of 8,192 tokens; with the share of the GPU's operations that they reach."""
    recipe = session.sft("qwen3-0.6b", 8192, 1)
    return _with_utilisation(session, "speed8k", session.train("speed8k", recipe))


def one_document(session: Session) -> dict[str, Any]:
    """As many tokens, one document a row: what attention to packed documents costs."""
    recipe = session.sft("qwen3-0.6b", 8192, 1)
    length = session.tokens(8192)
    data = {"train": [{"path": session.texts(length)}], "max_length": length, "packing": False}
    return session.train("one-document", {**recipe, "data": data, "method": "pretrain"})


def speed2k(session: Session) -> dict[str, Any]:
    """Four packed rows of 2,048 tokens."""
    return session.train("speed2k", session.sft("qwen3-0.6b", 2048, 4))


def same(session: Session) -> dict[str, Any]:
    """float32 on the GPU and on the CPU: how far the losses are apart. Twice with `deterministic`,
    in the GPU's own type: they must be equal."""
    recipe = session.sft("qwen3-0.6b", 256, 2, 60)
    wide = {**recipe, "model": {"base": str(QUICK / "base"), "dtype": "float32"}}
    gpu, cpu = session.train("same-gpu", wide), session.train("same-cpu", wide, hidden=True)
    fixed = {**recipe, "model": {"base": str(QUICK / "base")}, "deterministic": True}
    first, second = session.train("same-a", fixed), session.train("same-b", fixed)
    pairs = zip(gpu.get("losses", ()), cpu.get("losses", ()), strict=False)
    losses = first.get("losses")
    return {
        "twice_equal": bool(losses) and losses == second.get("losses"),
        "largest_difference_from_cpu": max((abs(a - b) for a, b in pairs), default=None),
        "rc": [run["rc"] for run in (gpu, cpu, first, second)],
        "tails": [run["tail"] for run in (gpu, cpu, first, second) if "tail" in run],
    }


def large(session: Session) -> dict[str, Any]:
    """The shape of Llama-3.1-8B, 8,192 packed tokens, as the estimate places it."""
    recipe = session.sft("llama-3.1-8b", 8192, 2)
    recipe["optim"] |= {"micro_batch_size": "auto", "max_steps": 6 if session.dry else 8}
    return _with_utilisation(session, "large", session.train("large", recipe, 220))


def types(session: Session) -> dict[str, Any]:
    """float16, 4 and 8 bits, checkpointing, and all weights."""
    changes: dict[str, dict[str, Any]] = {
        "fp16": {"dtype": "float16"},
        "nf4": {"quantize": "nf4"},
        "int8": {"quantize": "int8"},
        "checkpointing": {"gradient_checkpointing": True},
        "whole": {},
    }
    results = {}
    for name, model in changes.items():
        if session.dry and name == "fp16":  # needs a GPU
            continue
        recipe = session.sft("qwen3-0.6b", 512, 2, 60)
        recipe["model"] |= model
        if name == "whole":
            del recipe["adapter"]
        results[name] = session.train(f"types-{name}", recipe, 100)
    return results


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
    results = {}
    for method in ({"kind": "dpo"}, {"kind": "kto"}, {"kind": "reward"}, online):
        kind = str(method["kind"])
        recipe = session.sft("qwen3-0.6b", 512, 8, 60)
        recipe["model"] = {"base": str(QUICK / "base")}
        recipe["optim"] |= {"max_steps": 4, "micro_batch_size": 4}
        recipe["data"] |= {"max_length": 512}
        if kind != "grpo":
            recipe["data"]["train"] = [{"path": str(QUICK / "pairs.jsonl")}]
        results[kind] = session.train(f"method-{kind}", {**recipe, "method": method}, 100)
    return results


def out_of_memory(session: Session) -> dict[str, Any]:
    """A microbatch that cannot fit: halved until the run goes on."""
    if session.dry:
        return {"note": "a CPU has no such limit"}
    recipe = session.sft("qwen3-0.6b", 4096, 256)
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
    """The figures with `mfu`: needed operations over those that the GPU's large product reached."""
    from finray.training.models.memory_estimate import sizes_of
    from finray.training.models.speed import training_flops

    run = session.folder / "runs" / name
    if seen["rc"] != 0 or not seen.get("tokens_per_second"):
        return seen
    recipe = _recipe_of(run)
    flops = training_flops(recipe, sizes_of(recipe)) * seen["tokens_per_second"]
    reached = machine(session).get("tflops_of_16_bits")
    share = None if reached is None else round(flops / reached / 1e12, 3)
    return {**seen, "tflops": round(flops / 1e12, 3), "mfu_of_measured": share}


STAGES: dict[str, Callable[[Session], dict[str, Any]]] = {
    "machine": machine,
    "speed8k": speed8k,
    "one_document": one_document,
    "same": same,
    "large": large,
    "speed2k": speed2k,
    "types": types,
    "methods": methods,
    "out_of_memory": out_of_memory,
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
        if session.seconds_left <= 0:
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
    if sys.argv[1:2] == ["--probe"]:
        return probe(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"stages, with commas: {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=630.0, help="of all stages together")
    parser.add_argument("--name", help="of the results (default: the GPU's, or dry)")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--folder", type=Path, help="for models and runs (default: a new one)")
    options = parser.parse_args()
    names = (options.only or ",".join(STAGES)).split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"there is no stage {', '.join(unknown)}; those are {', '.join(STAGES)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="finray-gpu-"))
    session = Session(folder, options.dry, options.seconds)
    name = options.name or ("dry" if options.dry else _name_of_gpu())
    results = RESULTS if not options.dry else folder
    run_stages(names, session, results / f"gpu-{name}.json")
    return 0


def _name_of_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU here; --dry tries the stages with tiny models")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
