"""Pretrain the bundled ESM2-architecture checkpoint on the UniProt sample, then write its model card.

    python scripts/pretrain_esm2.py split --corpus uniprot_sample.fasta.gz     # once: makes the two data files
    python scripts/pretrain_esm2.py train --minutes 120 --state pretrain.pt    # hours; continues from --state
    python scripts/pretrain_esm2.py card  --state pretrain.pt                  # evaluates, exports, writes the card

The corpus is split by *genus*: no organism of the file that ships as the federation's sample was ever seen in
pretraining, so what the demo reports on it is an honest "never trained on" figure.
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
from pathlib import Path

import numpy as np
import torch
import transformers.models.esm.modeling_esm as modeling_esm
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "data" / "uniprot" / "uniprot_pretrain.fasta.gz"
PACKAGE = ROOT / "src" / "sfl" / "esm2" / "bundled"
HELD_OUT = PACKAGE / "uniprot_sample.fasta.gz"
MODEL = PACKAGE / "model"
HELD_OUT_SHARE = 0.20
RESIDUES = "LAGVSERTIDPKQNFYMHWC"
TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", *"XBUZO", ".", "-", "<null_1>", "<mask>"]
PAD, CLS, EOS, MASK = 1, 0, 2, 32
FIRST_RESIDUE = 4


def read_fasta(path: Path) -> list[tuple[str, str]]:
    records: list[tuple[str, str]] = []
    with gzip.open(path, "rt") as handle:
        for block in ("\n" + handle.read()).split("\n>")[1:]:  # a header may hold a ">" of its own
            header, _, body = block.partition("\n")
            records.append((header.strip(), body.replace("\n", "")))
    return records


def genus(header: str) -> str:
    words = header.rpartition("OS=")[2].split()
    while len(words) > 1 and words[0].strip("'[]\"").lower() in {"candidatus", "uncultured", "unclassified"}:
        words = words[1:]
    return words[0].strip("'[]\"()").lower() if words else ""


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"sfl-esm2-pretraining|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def write_fasta(path: Path, records: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f">{header}\n{sequence}\n" for header, sequence in records)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=9, filename="") as out:
        out.write(text.encode())


def split(corpus: Path) -> None:
    records = read_fasta(corpus)
    write_fasta(PRETRAIN, [r for r in records if not is_held_out(genus(r[0]))])
    write_fasta(HELD_OUT, [r for r in records if is_held_out(genus(r[0]))])
    for path in (PRETRAIN, HELD_OUT):
        kept = read_fasta(path)
        residues = sum(len(s) for _, s in kept)
        print(f"{path.name}: {len(kept)} proteins, {residues} residues, {len({genus(h) for h, _ in kept})} genera")


def encode(sequence: str) -> np.ndarray:
    table = np.full(256, 3, dtype=np.int64)
    for index, token in enumerate(TOKENS):
        if len(token) == 1:
            table[ord(token)] = index
    return table[np.frombuffer(sequence.encode(), dtype=np.uint8)]


def batches(sequences: list[np.ndarray], length: int, tokens: int, rng: np.random.Generator):
    """One epoch of length-sorted batches of random crops, about ``tokens`` tokens each, in random order."""
    crops: list[np.ndarray] = []
    for sequence in sequences:
        pieces = max(1, round(len(sequence) / length))
        for start in rng.integers(0, max(1, len(sequence) - length + 1), size=pieces):
            crops.append(sequence[start : start + length])
    order = sorted(range(len(crops)), key=lambda i: (len(crops[i]), rng.random()))
    groups: list[list[int]] = [[]]
    for index in order:
        if (len(groups[-1]) + 1) * (len(crops[index]) + 2) > tokens and groups[-1]:
            groups.append([])
        groups[-1].append(index)
    for position in rng.permutation(len(groups)):
        yield pad([crops[i] for i in groups[position]])


def pad(crops: list[np.ndarray]) -> np.ndarray:
    width = max(len(c) for c in crops) + 2
    ids = np.full((len(crops), width), PAD, dtype=np.int64)
    for row, crop in enumerate(crops):
        ids[row, 0] = CLS
        ids[row, 1 : 1 + len(crop)] = crop
        ids[row, 1 + len(crop)] = EOS
    return ids


def mask(ids: np.ndarray, rng: np.random.Generator, masked: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """BERT masking: 15 % of residues selected; of them 80 % masked, the rest half swapped, half kept.

    Evaluation masks all of them: the unigram baseline cannot see a kept residue, so neither may the model.
    """
    selected = (rng.random(ids.shape) < 0.15) & (ids >= FIRST_RESIDUE) & (ids != MASK)
    kind = rng.random(ids.shape)
    corrupted = ids.copy()
    corrupted[selected & (kind < masked)] = MASK
    swap = selected & (kind >= masked) & (kind < (1.0 + masked) / 2)
    corrupted[swap] = rng.integers(FIRST_RESIDUE, FIRST_RESIDUE + 20, size=int(swap.sum()))
    return corrupted, selected


def precision() -> str:
    """bfloat16 where the processor computes it, else float32: emulated, it is five times slower."""
    found = torch.cpu.get_capabilities()
    return "bfloat16" if found.get("amx_bf16") or found.get("avx512_bf16") else "float32"


def loss_sum(
    model: EsmForMaskedLM, ids: np.ndarray, rng: np.random.Generator, masked: float = 0.8
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Summed cross-entropy over the selected residues; the head runs on those positions alone."""
    corrupted, selected = mask(ids, rng, masked)
    tensor = torch.from_numpy(corrupted)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision() == "bfloat16"):
        hidden = model.esm(tensor, attention_mask=(tensor != PAD).long()).last_hidden_state
        logits = model.lm_head(hidden[torch.from_numpy(selected)])
    target = torch.from_numpy(ids[selected])
    loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")
    return loss, int(selected.sum()), (logits.argmax(-1) == target).sum()


def new_model(width: int, layers: int) -> EsmForMaskedLM:
    config = EsmConfig(
        vocab_size=33, mask_token_id=MASK, pad_token_id=PAD, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, intermediate_size=4 * width, max_position_embeddings=1026,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, position_embedding_type="rotary",
        emb_layer_norm_before=False, token_dropout=True, tie_word_embeddings=True, layer_norm_eps=1e-5,
    )  # fmt: skip
    # On a CPU the backward pass of fused attention is slower than plain matrix products: 4,300 against 7,100 tokens a second.
    return EsmForMaskedLM._from_config(config, attn_implementation="eager")


def train(args: argparse.Namespace) -> None:
    """The learning rate falls linearly over the *time* budget, so the same command suits any machine."""
    torch.set_num_threads(args.threads)
    modeling_esm.gelu = torch.nn.functional.gelu  # the same exact GELU in one kernel: 10 % of a step
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    torch.manual_seed(args.seed)
    model = new_model(args.width, args.layers)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    sequences = [encode(s) for _, s in read_fasta(PRETRAIN)]
    step, epoch, spent, tokens = 0, 0, 0.0, 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, epoch, spent, tokens = state["step"], state["epoch"] + 1, state["seconds"], state["tokens"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(sequences)} proteins", flush=True)
    window: collections.deque[float] = collections.deque(maxlen=100)
    saved = started = time.monotonic()

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch,
                 "seconds": spent + time.monotonic() - started, "tokens": tokens, "width": args.width,
                 "layers": args.layers, "lr": args.lr, "minutes": args.minutes, "seed": args.seed,
                 "length": args.length, "batch_tokens": args.tokens, "precision": precision()}  # fmt: skip
        partial = args.state.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(args.state)

    progress = spent / (60 * args.minutes)
    while progress < 1.0 and not stop:
        rng = np.random.Generator(np.random.Philox(key=[args.seed, epoch]))
        for ids in batches(sequences, args.length, args.tokens, rng):
            progress = (spent + time.monotonic() - started) / (60 * args.minutes)
            if progress >= 1.0 or stop:
                break
            rate = min(1.0, (step + 1) / args.warmup) * (1.0 - progress)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
            total, count, _ = loss_sum(model, ids, rng)
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(total.item() / count)
            step, tokens = step + 1, tokens + ids.size
            if step % 50 == 0:
                mean = sum(window) / len(window)
                seconds = spent + time.monotonic() - started
                print(f"step {step} epoch {epoch} loss {mean:.4f} ppl {math.exp(mean):.2f} {seconds:.0f}s", flush=True)
            if time.monotonic() - saved > 300:
                save()
                saved = time.monotonic()
        epoch += 1
    save()


@torch.inference_mode()
def evaluate(model: EsmForMaskedLM, records: list[tuple[str, str]], length: int = 512) -> dict[str, float]:
    rng = np.random.Generator(np.random.Philox(key=[7, 7]))
    totals = [0.0, 0, 0]
    for ids in batches([encode(s) for _, s in records], length, 8192, rng):
        loss, count, correct = loss_sum(model, ids, rng, masked=1.0)
        totals[0] += loss.item()
        totals[1] += count
        totals[2] += int(correct)
    return {
        "perplexity": math.exp(totals[0] / totals[1]),
        "masked_accuracy": totals[2] / totals[1],
        "masked": totals[1],
    }


def unigram(train_records: list[tuple[str, str]], records: list[tuple[str, str]]) -> dict[str, float]:
    """The baseline that knows how often each residue occurs in the *training* proteins, and nothing else."""
    seen = collections.Counter("".join(s for _, s in train_records))
    held = collections.Counter("".join(s for _, s in records))
    total, size = sum(seen.values()), sum(held.values())
    loss = -sum(n * math.log(seen[r] / total) for r, n in held.items()) / size
    return {"perplexity": math.exp(loss), "masked_accuracy": held[seen.most_common(1)[0][0]] / size}


def card(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    state = torch.load(args.state, weights_only=True)
    model = new_model(state["width"], state["layers"])
    model.load_state_dict(state["model"])
    model = model.half().float().eval()  # what ships is float16: evaluate exactly that
    held, seen = read_fasta(HELD_OUT), read_fasta(PRETRAIN)
    figures = {f"model_{length}": evaluate(model, held, length) for length in (128, 512)}
    figures["unigram"] = unigram(seen, held)
    state.setdefault("precision", precision())
    figures["training"] = {k: v for k, v in state.items() if k not in {"model", "optimizer"}}
    MODEL.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(MODEL)
    (MODEL / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    EsmTokenizer(str(MODEL / "vocab.txt"), model_max_length=1024).save_pretrained(MODEL)
    (MODEL / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    (MODEL / "README.md").write_text(model_card(figures, len(seen), len(held)))
    print(json.dumps(figures, indent=2))


def model_card(figures: dict[str, dict[str, float]], seen: int, held: int) -> str:
    ours, longer, baseline, how = (figures[name] for name in ("model_128", "model_512", "unigram", "training"))
    return f"""# A small ESM2-architecture protein language model

`EsmForMaskedLM`, {how["layers"]} layers of width {how["width"]}, rotary positions, token dropout, 33 tokens: 2.7 million parameters, stored
in float16. It is here so that SFL works offline at once. It is no substitute for the published ESM2 models: use those
(`--model facebook/esm2_t6_8M_UR50D`) for real work.

## Held-out figures

On {held:,} proteins of genera that it was never trained on, 15 % of the residues masked (all of the selected ones replaced by
`<mask>`, {ours["masked"]:,} of them), weights as shipped:

| | perplexity | masked accuracy |
|---|---|---|
| this model, crops of 128 residues (the default of a run) | {ours["perplexity"]:.2f} | {100 * ours["masked_accuracy"]:.1f} % |
| this model, crops of 512 residues (longer than any it was trained on) | {longer["perplexity"]:.2f} | {100 * longer["masked_accuracy"]:.1f} % |
| unigram (residue frequencies of the training proteins) | {baseline["perplexity"]:.2f} | {100 * baseline["masked_accuracy"]:.1f} % |

Genera are disjoint; homologous proteins may be on both sides.

## Training

`scripts/pretrain_esm2.py`, seed {how["seed"]}: {how["step"]:,} steps of about {how["batch_tokens"]:,} tokens ({how["tokens"] / 1e6:.1f} million in all) on {seen:,} UniProtKB
proteins, random crops of {how["length"]} residues in length-sorted batches, BERT masking (15 %, 80/10/10), AdamW (β 0.9, 0.98;
weight decay 0.01 on matrices), gradients clipped at 1, learning rate {how["lr"]:g} after 200 warm-up steps falling linearly to
zero, {how["seconds"] / 3600:.1f} hours on one shared CPU core, in {how["precision"]}.

## Licence

Weights: MIT, like SFL. Training data: UniProtKB, © UniProt Consortium, CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/); sequences were selected, cropped and masked.
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
    for flag, default in {"minutes": 120, "width": 192, "layers": 6, "length": 128, "tokens": 4096, "warmup": 200, "seed": 7}.items():  # fmt: skip
        sub.add_argument(f"--{flag}", type=int, default=default)
    sub.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    if args.command == "split":
        split(args.corpus)
    else:
        {"train": train, "card": card}[args.command](args)


if __name__ == "__main__":
    main()
