"""Examples from JSON lines to padded batches, longest first. Called by the command; `collect` takes any batches.

A line is an object. By task:

- `causal-lm`: `text`; or `prompt` and `completion`, where only the completion is a target.
- `seq2seq`: `input` and `target`; optionally `choices`, a list of answers that the true Fisher draws from.
- `classification`: `text`, optionally `text_pair`, and `label`, a number or one of the config's names.
- any: `input_ids` and `labels` (causal-lm: optional), already tokenised.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from .errors import CollectError
from .tokens import IGNORED

# Rows from which on a product runs at about full speed.
FAST_TOKENS = 256


@dataclass
class Example:
    """Token ids. `labels`: of each input token (causal-lm), of the target (seq2seq), or one class."""

    id: int
    input_ids: List[int]
    labels: Any
    token_type_ids: Optional[List[int]] = None
    choices: Optional[List[List[int]]] = None

    @property
    def length(self) -> int:
        targets = [self.labels] if isinstance(self.labels, list) else []
        return max(len(sequence) for sequence in [self.input_ids, *targets, *(self.choices or [])])


def read_lines(path: Path, limit: Optional[int], fields: Mapping[str, str]) -> List[Dict[str, Any]]:
    """The first `limit` objects, their fields renamed: `fields` maps our names to the file's."""
    records: List[Dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a mark
            for number, line in enumerate(file, 1):
                if limit is not None and len(records) == limit:
                    break
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise CollectError(f"{path}:{number}: no JSON: {error}") from error
                if not isinstance(record, dict):
                    raise CollectError(f"{path}:{number}: expected an object, got {type(record).__name__}")
                for ours, theirs in fields.items():
                    if theirs not in record:
                        raise CollectError(f"{path}:{number}: has no field `{theirs}` (it has {', '.join(record)})")
                    record[ours] = record[theirs]
                record["line"] = number
                records.append(record)
    except (OSError, UnicodeDecodeError) as error:
        raise CollectError(f"{path}: cannot be read: {error}") from error
    if not records:
        raise CollectError(f"{path}: has no examples")
    return records


class Reader:
    """Makes examples of one task. `tokenizer` may be `None` where every line is tokenised."""

    def __init__(self, path: Path, task: str, tokenizer: Any, max_length: int, label2id: Mapping[str, int],
                 classes: Optional[int] = None, words: Optional[int] = None) -> None:
        self.path, self.task, self.tokenizer, self.max_length = path, task, tokenizer, max_length
        self.classes, self.words = classes, words
        self.label2id = {str(name): int(place) for name, place in label2id.items()}

    def examples(self, records: Sequence[Mapping[str, Any]]) -> List[Example]:
        found = [self.example(i, record) for i, record in enumerate(records)]
        for example, record in zip(found, records):
            targets = example.labels if isinstance(example.labels, list) else []
            ids = [*example.input_ids, *(label for label in targets if label != IGNORED), *sum(example.choices or [], [])]
            wrong = [] if self.words is None else [id for id in ids if not 0 <= id < self.words]
            if wrong:
                raise CollectError(f"{self.path}:{record['line']}: token {wrong[0]} is none of the model's {self.words}; is the "
                                   "tokenizer the model's?")
        return [example for example in found if example.input_ids]

    def _field(self, record: Mapping[str, Any], name: str) -> str:
        value = record.get(name)
        if not isinstance(value, str):
            raise CollectError(f"{self.path}:{record['line']}: task {self.task} needs the text field `{name}`, "
                               f"found {', '.join(key for key in record if key != 'line')} (see --field)")
        return value

    def _ids(self, text: str, special: bool = True) -> List[int]:
        if self.tokenizer is None:
            raise CollectError(f"{self.path}: has text, and the model has no tokenizer; give `input_ids`, or --tokenizer")
        return list(self.tokenizer(text, add_special_tokens=special, truncation=True, max_length=self.max_length)["input_ids"])

    def _label(self, record: Mapping[str, Any]) -> int:
        label = record.get("label", record.get("labels"))
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise CollectError(f"{self.path}:{record['line']}: `label` is {label!r}; expected a class's number or name")
        if isinstance(label, str):
            if label not in self.label2id:
                raise CollectError(f"{self.path}:{record['line']}: label `{label}` is none of the model's "
                                   f"({', '.join(sorted(self.label2id))})")
            return self.label2id[label]
        if label != IGNORED and not 0 <= label < (label + 1 if self.classes is None else self.classes):
            raise CollectError(f"{self.path}:{record['line']}: label {label} is no class of the model's {self.classes}")
        return label

    def _choices(self, record: Mapping[str, Any], kind: type) -> Optional[List[Any]]:
        choices = record.get("choices")
        if choices is not None and not (isinstance(choices, list) and choices and all(isinstance(c, kind) for c in choices)):
            raise CollectError(f"{self.path}:{record['line']}: `choices` is no list of {'texts' if kind is str else 'lists'}")
        return choices

    def example(self, i: int, record: Mapping[str, Any]) -> Example:
        if "input_ids" in record:
            return self._tokenised(i, record)
        if self.task == "classification":
            pair = self._field(record, "text_pair") if record.get("text_pair") is not None else None
            text = self._field(record, "text")
            if self.tokenizer is None:
                self._ids(text)
            encoded = self.tokenizer(text, pair, truncation=True, max_length=self.max_length)
            return Example(i, list(encoded["input_ids"]), self._label(record), encoded.get("token_type_ids"))
        if self.task == "seq2seq":
            choices = self._choices(record, str)
            return Example(i, self._ids(self._field(record, "input")), self._ids(self._field(record, "target")),
                           choices=None if choices is None else [self._ids(choice) for choice in choices])
        if "prompt" in record:
            prompt = self._ids(self._field(record, "prompt"))
            completion = self._ids(self._field(record, "completion"), special=False)
            end = self.tokenizer.eos_token_id
            completion += [end] if end is not None else []
            ids = (prompt + completion)[: self.max_length]
            return Example(i, ids, ([IGNORED] * len(prompt) + completion)[: self.max_length])
        ids = self._ids(self._field(record, "text"))
        return Example(i, ids, list(ids))

    def _tokenised(self, i: int, record: Mapping[str, Any]) -> Example:
        def numbers(name: str, value: Any) -> List[int]:
            if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                raise CollectError(f"{self.path}:{record['line']}: `{name}` is no list of numbers")
            return list(value[: self.max_length])

        ids = numbers("input_ids", record["input_ids"])
        if self.task == "classification":
            types = numbers("token_type_ids", record["token_type_ids"]) if "token_type_ids" in record else None
            return Example(i, ids, self._label(record), types)
        labels = numbers("labels", record.get("labels")) if self.task == "seq2seq" or "labels" in record else list(ids)
        if self.task == "causal-lm" and len(labels) != len(ids):
            raise CollectError(f"{self.path}:{record['line']}: {len(ids)} input_ids and {len(labels)} labels")
        choices = self._choices(record, list)
        return Example(i, ids, labels,
                       choices=None if choices is None else [numbers("choices", choice) for choice in choices])


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    length = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), length), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
    return out


def batch_of(examples: Sequence[Example], pad: int) -> Dict[str, Tensor]:
    """One padded batch, padding on the right."""
    ids = _padded([e.input_ids for e in examples], pad)
    batch = {
        "input_ids": ids,
        "attention_mask": _padded([[1] * len(e.input_ids) for e in examples], 0),
        "example_ids": torch.tensor([e.id for e in examples]),
    }
    if any(e.token_type_ids is not None for e in examples):
        batch["token_type_ids"] = _padded([e.token_type_ids or [0] * len(e.input_ids) for e in examples], 0)
    if isinstance(examples[0].labels, list):
        batch["labels"] = _padded([e.labels for e in examples], IGNORED)
    else:
        batch["labels"] = torch.tensor([e.labels for e in examples])
    if any(e.choices for e in examples):
        count = max(len(e.choices or []) for e in examples)
        rows = [list(choice) for e in examples for choice in [*(e.choices or []), *([[]] * count)][:count]]
        batch["choices"] = _padded(rows, IGNORED).reshape(len(examples), count, -1)
    return batch


def into_batches(examples: Sequence[Example], batch_tokens: int, pad: int) -> List[Dict[str, Tensor]]:
    """Batches of at most `batch_tokens` padded tokens (one example at least), the longest examples first.

    The first batch is the one that needs the most memory. Once a batch is large enough for fast products, an example
    that would be padded by a third of its length begins another.
    """
    batches: List[Dict[str, Tensor]] = []
    batch: List[Example] = []
    for example in sorted(examples, key=lambda e: (-e.length, e.id)):
        tokens = len(batch) * batch[0].length if batch else 0
        padded = tokens >= FAST_TOKENS and 4 * example.length < 3 * batch[0].length
        if batch and (padded or tokens + batch[0].length > batch_tokens):
            batches.append(batch_of(batch, pad))
            batch = []
        batch.append(example)
    if batch:
        batches.append(batch_of(batch, pad))
    return batches
