"""Run directories as the training loop leaves them."""

import json
import math
import random

POLICY = "layers.0.*: w=none | layers.*: w=fbi"


def write_run(folder, name="fbi-ad", *, teacher=True, scales=True, done=True, steps=700, drop=0.0, seed=0, **files):
    """A run directory as the training loop leaves it; `files` replace whole files by name."""
    draw = random.Random(seed)
    rows = []
    for site in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down") if scales else ():
        for step in (0, steps):
            for layer in range(3):
                alpha = 0.016 * (1 if step == 0 else 1 + 0.2 * layer + 0.1 * draw.random())
                rows.append({
                    "kind": "scales", "step": step, "site": f"layers.{layer}.{site}",
                    "alpha": {"mean": alpha, "std": alpha / 8, "min": alpha / 2, "max": 2 * alpha},
                    "beta": {"mean": 1e-4 * layer, "std": 2e-4, "min": -1e-3, "max": 1e-3},
                })  # fmt: skip
    for step in range(10, steps + 1, 10):
        loss = 3.6 - drop + 3.3 * math.exp(-step / 120) + draw.gauss(0, 0.05)
        row = {"kind": "train", "step": step, "tokens": 4096 * step, "loss": loss, "ce": loss, "grad_norm": 0.7,
               "lr": 1e-3, "time_step_s": 0.25, "time_tokens_per_s": 16000.0 + step}  # fmt: skip
        rows.append(row | ({"floor": 3.2 + draw.gauss(0, 0.05)} if teacher else {}))
        if step % 100 == 0:
            validation = 3.63 - drop + 3.3 * math.exp(-step / 120)
            rows.append({"kind": "eval", "step": step, "split": "validation", "loss": validation,
                         "perplexity": math.exp(validation), "bits_per_byte": validation / math.log(2) / 2.6,
                         "tokens": 20000})  # fmt: skip
    rows.append({"kind": "event", "step": 30, "what": "spike", "text": "gradient norm 12, step left out"})
    run = {"name": name, "model": {"dim": 128, "layers": 3}, "policy": POLICY, "loss": "ad" if teacher else "ce",
           "teacher": "runs/fp" if teacher else None, "data": {"corpus": "nltk:state_union"},
           "optimizer": {"name": "adamw", "lr": 3e-3}, "steps": steps, "seed": 0}  # fmt: skip
    summary = {"parameters": 834816, "stored_bits_per_weight": 1.25, "paper_bits_per_weight": 1.03,
               "stored_megabytes": 0.61, "unigram_entropy": 6.0614, "vocab": 1024}  # fmt: skip
    content = {
        "config.json": json.dumps({"format": 1, "run": run}),
        "env.json": json.dumps({"jax": "0.10.2"}),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "summary.json": json.dumps(summary),
        "done.json": json.dumps({"step": steps}) if done else None,
    } | {key.replace("__", "."): value for key, value in files.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in content.items():
        if text is not None:
            (folder / file).write_text(text)
    return folder
