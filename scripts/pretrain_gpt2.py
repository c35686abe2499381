"""Pretrain the bundled GPT-2-architecture checkpoint on speeches of plays, then write its model card.

    python scripts/pretrain_gpt2.py split --corpus shakespeare_speeches.jsonl.gz   # once: makes the two data files
    python scripts/pretrain_gpt2.py train --minutes 90 --state pretrain.pt         # continues from --state
    python scripts/pretrain_gpt2.py card  --state pretrain.pt                      # evaluates, exports, writes the card

The corpus is split by *play*: none of the plays that ship as the federation's sample was seen in pretraining, not by the
model and not by its tokenizer, so what a run reports on them before its first round is an honest "never trained on".
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.gpt2.modeling_gpt2 as modeling_gpt2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "data" / "speeches" / "speeches_pretrain.jsonl.gz"
PACKAGE = ROOT / "src" / "sfl" / "llm" / "bundled"
HELD_OUT = PACKAGE / "speeches_sample.jsonl.gz"
MODEL = PACKAGE / "model"
HELD_OUT_SHARE = 0.20
VALIDATION = 20  # one speech in so many of the pretraining plays decides which weights are kept
EOS = 0
VOCABULARY = 2048
IGNORED = -100


def read_jsonl(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=9, filename="") as out:
        out.write(text.encode())


def is_held_out(work: str) -> bool:
    digest = hashlib.sha256(f"sfl-llm-pretraining|{work}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def split(corpus: Path) -> None:
    records = read_jsonl(corpus)
    write_jsonl(PRETRAIN, [r for r in records if not is_held_out(r["work"])])
    write_jsonl(HELD_OUT, [r for r in records if is_held_out(r["work"])])
    for path in (PRETRAIN, HELD_OUT):
        kept = read_jsonl(path)
        size, works = sum(len(r["text"]) for r in kept), sorted({r["work"] for r in kept})
        print(f"{path.name}: {len(kept)} speeches, {size} characters, {len(works)} plays: {', '.join(works)}")


def new_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, learnt from the pretraining plays alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Each text begins and ends with ``<|endoftext|>``: its first word is foretold from nothing, its end is foretold."""
    return [np.array([EOS, *found.ids, EOS], dtype=np.int64) for found in tokenizer.encode_batch(texts)]


def blocks(documents: list[np.ndarray], length: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents one after the other, cut into full rows of ``length``.

    Returns:
        Ids, targets (the next token of the same document, else ``IGNORED``) and positions within the document; a
        document that is cut begins anew at the next row. int64, shape (rows, length).
    """
    ids = np.concatenate([documents[i] for i in order])
    ends = np.cumsum([len(documents[i]) for i in order])
    targets = np.append(ids[1:], IGNORED)
    targets[ends - 1] = IGNORED
    starts = np.zeros(len(ids), dtype=np.int64)
    starts[ends[:-1]] = ends[:-1]
    rows = len(ids) // length
    starts[np.arange(0, len(ids), length)] = np.arange(0, len(ids), length)
    positions = np.arange(len(ids)) - np.maximum.accumulate(starts)
    cut = rows * length
    return tuple(part[:cut].reshape(rows, length) for part in (ids, targets, positions))  # pyright: ignore


def precision() -> str:
    """bfloat16 where the processor computes it, else float32."""
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def loss_sum(model: GPT2LMHeadModel, ids: np.ndarray, targets: np.ndarray, positions: np.ndarray) -> tuple[torch.Tensor, int, torch.Tensor]:  # fmt: skip
    """Summed cross-entropy over what is foretold; no token sees another document."""
    at = torch.from_numpy(positions)
    first = torch.arange(at.shape[1]) - at  # where the document of each token begins
    seen = (first[:, :, None] == first[:, None, :]) & torch.ones(at.shape[1], at.shape[1], dtype=torch.bool).tril()
    target = torch.from_numpy(targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision() == "bfloat16"):
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        hidden = model.transformer(torch.from_numpy(ids), attention_mask=mask, position_ids=at).last_hidden_state
        kept = target != IGNORED
        logits = model.lm_head(hidden[kept])
    loss = torch.nn.functional.cross_entropy(logits.float(), target[kept], reduction="sum")
    return loss, int(kept.sum()), (logits.argmax(-1) == target[kept]).sum()


def new_model(width: int, layers: int, length: int, dropout: float) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=length, n_embd=width, n_layer=layers, n_head=width // 32,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    # On a CPU the backward pass of fused attention is slower than plain matrix products.
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def train(args: argparse.Namespace) -> None:
    """The learning rate falls as a cosine over the *time* budget, so the same command suits any machine.

    Weights with the lowest validation loss are kept beside the newest: the corpus is small enough to be learnt by heart.
    """
    torch.set_num_threads(args.threads)
    modeling_gpt2.ACT2FN["gelu_new"] = (torch.nn.GELU, {"approximate": "tanh"})  # the same function in one kernel
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    torch.manual_seed(args.seed)
    texts = [r["text"] for r in read_jsonl(PRETRAIN)]
    held = [text for index, text in enumerate(texts) if index % VALIDATION == 0]
    texts = [text for index, text in enumerate(texts) if index % VALIDATION]
    tokenizer = new_tokenizer(texts)
    documents, validation = encode(tokenizer, texts), encode(tokenizer, held)
    model = new_model(args.width, args.layers, args.length, args.dropout)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    step, epoch, spent, tokens = 0, 0, 0.0, 0
    best: dict[str, Any] = {"loss": math.inf, "model": None, "epoch": -1}
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, spent, tokens = state["step"], state["epoch"] + 1, state["seconds"], state["tokens"]
        best = state["best"]
    size = sum(len(d) for d in documents)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(documents)} speeches, {size} tokens", flush=True)
    window: collections.deque[float] = collections.deque(maxlen=100)
    started = time.monotonic()
    budget = 60 * args.minutes

    def elapsed() -> float:
        return spent + time.monotonic() - started

    while elapsed() < budget and not stop:
        rng = np.random.Generator(np.random.Philox(key=[args.seed, epoch]))
        model.train()
        for group in batches(blocks(documents, args.length, rng.permutation(len(documents))), args.batch, rng):
            progress = elapsed() / budget
            if progress >= 1.0 or stop:
                break
            rate = min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for chosen in optimizer.param_groups:
                chosen["lr"] = args.lr * rate
            total, count, _ = loss_sum(model, *group)
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(total.item() / count)
            step, tokens = step + 1, tokens + group[0].size
        found = math.log(evaluate(model, validation, args.length)["perplexity"])
        if found < best["loss"]:
            best = {"loss": found, "epoch": epoch, "model": {k: v.clone() for k, v in model.state_dict().items()}}
        print(f"step {step} epoch {epoch} loss {sum(window) / len(window):.4f} validation {found:.4f} {elapsed():.0f}s", flush=True)  # fmt: skip
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best, "step": step,
                 "epoch": epoch, "seconds": elapsed(), "tokens": tokens, "width": args.width, "layers": args.layers,
                 "lr": args.lr, "minutes": args.minutes, "seed": args.seed, "length": args.length,
                 "batch": args.batch, "decay": args.decay, "dropout": args.dropout, "precision": precision(),
                 "tokenizer": tokenizer.to_str()}  # fmt: skip
        partial = args.state.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(args.state)
        epoch += 1


def batches(rows: tuple[np.ndarray, np.ndarray, np.ndarray], size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    order = rng.permutation(len(rows[0]))
    for start in range(0, len(order), size):
        yield tuple(part[order[start : start + size]] for part in rows)


@torch.inference_mode()
def evaluate(model: GPT2LMHeadModel, documents: list[np.ndarray], length: int) -> dict[str, float]:
    model.eval()
    totals = [0.0, 0, 0]
    padded = [*documents, np.full(length, EOS, dtype=np.int64)]  # full rows for all; what is left of this is dropped
    rows = blocks(padded, length, np.arange(len(padded)))
    for group in batches(rows, 32, np.random.default_rng(0)):
        loss, count, correct = loss_sum(model, *group)
        totals[0] += loss.item()
        totals[1] += count
        totals[2] += int(correct)
    return {"perplexity": math.exp(totals[0] / totals[1]), "token_accuracy": totals[2] / totals[1], "tokens": totals[1]}


def unigram(seen: list[np.ndarray], held: list[np.ndarray]) -> dict[str, float]:
    """The baseline that knows how often each token occurs in the *training* plays (one added to each), and no more."""
    counts = collections.Counter(int(t) for d in seen for t in d[1:])
    targets = [int(t) for d in held for t in d[1:]]
    total = sum(counts.values()) + VOCABULARY
    loss = -sum(math.log((counts[t] + 1) / total) for t in targets) / len(targets)
    best = counts.most_common(1)[0][0]
    return {"perplexity": math.exp(loss), "token_accuracy": sum(t == best for t in targets) / len(targets)}


def card(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    state = torch.load(args.state, weights_only=True)
    model = new_model(state["width"], state["layers"], state["length"], 0.0)
    model.load_state_dict(state["best"]["model"])
    model = model.half().float().eval()  # what ships is float16: evaluate exactly that
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    seen = encode(tokenizer, [r["text"] for r in read_jsonl(PRETRAIN)])
    records = read_jsonl(HELD_OUT)
    held = encode(tokenizer, [r["text"] for r in records])
    figures: dict[str, Any] = {"model": evaluate(model, held, state["length"]), "unigram": unigram(seen, held)}
    characters = sum(len(r["text"].encode()) for r in records)
    bits = math.log2(figures["model"]["perplexity"]) * figures["model"]["tokens"] / characters
    figures["model"]["bits_per_byte"] = bits
    figures["training"] = {k: v for k, v in state.items() if k not in {"model", "optimizer", "best", "tokenizer"}}
    figures["training"]["kept_epoch"] = state["best"]["epoch"]
    MODEL.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(MODEL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=state["length"]
    ).save_pretrained(MODEL)
    (MODEL / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    (MODEL / "README.md").write_text(model_card(figures, len(seen), len(held), parameters))
    print(json.dumps(figures, indent=2))


def model_card(figures: dict[str, dict[str, float]], seen: int, held: int, parameters: int) -> str:
    ours, baseline, how = (figures[name] for name in ("model", "unigram", "training"))
    return f"""# A small GPT-2-architecture language model

`GPT2LMHeadModel`, {how["layers"]} layers of width {how["width"]}, {how["length"]} positions, byte-level BPE of {VOCABULARY:,} tokens: {parameters / 1e6:.1f} million
parameters, stored in float16. It is here so that SFL works offline at once. It is no substitute for a published model: use
those (`--model openai-community/gpt2`) for real work.

## Held-out figures

On {held:,} speeches of plays that neither it nor its tokenizer was ever trained on ({ours["tokens"]:,} tokens), weights as shipped:

| | perplexity | token accuracy |
|---|---|---|
| this model | {ours["perplexity"]:.1f} | {100 * ours["token_accuracy"]:.1f} % |
| unigram (token frequencies of the training plays) | {baseline["perplexity"]:.1f} | {100 * baseline["token_accuracy"]:.1f} % |

That is {ours["bits_per_byte"]:.2f} bits a byte. Some characters speak in plays on both sides (Falstaff, for one).

## Training

`scripts/pretrain_gpt2.py`, seed {how["seed"]}: {how["step"]:,} steps of {how["batch"]} rows of {how["length"]} tokens ({how["tokens"] / 1e6:.1f} million in all, {how["epoch"] + 1} epochs) on
{seen:,} speeches, packed, no attention across speeches, AdamW (β 0.9, 0.98; weight decay {how["decay"]:g} on matrices), dropout
{how["dropout"]:g}, gradients clipped at 1, learning rate {how["lr"]:g} after {how.get("warmup", 200)} warm-up steps falling as a cosine to zero, {how["seconds"] / 3600:.1f} hours on
one shared CPU core, in {how["precision"]}. Of all epochs the weights with the lowest loss on one speech in {VALIDATION} of the
training plays were kept (epoch {how["kept_epoch"] + 1}).

## Licence

Weights: MIT, like SFL. Training data: speeches of William Shakespeare's plays (public domain) in the edition of the Open
Knowledge Foundation's Open Shakespeare, CC BY 2.5 (https://creativecommons.org/licenses/by/2.5/); selected and tokenised.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("split").add_argument("--corpus", type=Path, required=True)
    for name in ("train", "card"):
        sub = commands.add_parser(name)
        sub.add_argument("--state", type=Path, default=Path("pretrain.pt"))
        sub.add_argument("--threads", type=int, default=1)
    sub = commands.choices["train"]
    for flag, default in {"minutes": 90, "width": 192, "layers": 6, "length": 256, "batch": 16, "warmup": 200, "seed": 7}.items():  # fmt: skip
        sub.add_argument(f"--{flag}", type=int, default=default)
    for flag, default in {"lr": 1.5e-3, "decay": 0.1, "dropout": 0.2}.items():
        sub.add_argument(f"--{flag}", type=float, default=default)
    args = parser.parse_args()
    if args.command == "split":
        split(args.corpus)
    else:
        {"train": train, "card": card}[args.command](args)


if __name__ == "__main__":
    main()
